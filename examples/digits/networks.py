"""The networks that the demo can train: construction, loss and predictions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastseg
from examples.digits.comparison import (
    StockUnpoolingNetwork,
    fuse_by_hand,
    make_indices_flat_by_hand,
    stock_upsampling_network,
)
from examples.digits.scenes import CLASSES, IGNORE, SIDE
from fastseg.models import ContextModule, DeepLabV2ResNet, FCN32s, FCN32sAlexNet, UNetAarhus, registry

BACKGROUND_WEIGHT = 0.3
SLOW = (FCN32s, FCN32sAlexNet, DeepLabV2ResNet)  # these learn with smaller steps only


@dataclass(frozen=True)
class Choice:
    """One network. `build` takes the width; `loss` and `predict` take the network and normalised images."""

    title: str
    picture: str  # file name
    build: Callable
    loss: Callable
    predict: Callable
    width: float  # 1 is the published one
    steps: int
    batch: int  # scenes per step
    learning_rate: float  # the maximum
    comparison: tuple  # the first arguments of `comparison.compare`: a stock network and the change by hand


def build_fcn8s(width):
    """FCN-8s with all layers ``width`` times as wide as in VGG16.

    With a batch normalisation after each trunk convolution it trains from random weights in a few hundred steps.
    """
    network = fastseg.models.FCN8s(
        len(CLASSES), padding="same", upsampling="interp", width_multiplier=width, dropout=0.0
    )
    return with_batch_norms(network)


def with_batch_norms(network):
    """A batch normalisation after every convolution but those of scores, in place."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.out_channels != network.num_classes:
                setattr(module, name, nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    return network


def fcn8s_loss(network, images, labels):
    scores = network.coarse_scores(images)  # at an eighth of the resolution
    return fastseg.ops.upsample_cross_entropy_dice(scores, labels, ignore_index=IGNORE)


def fcn8s_predict(network, images):
    """Labels from the coarse scores; the full-size scores are never stored."""
    scores = network.coarse_scores(images)
    return fastseg.ops.upsample_argmax(scores, size=images.shape[2:], dtype=torch.uint8)


def build_segnet_basic(width):
    return fastseg.models.SegNetBasic(len(CLASSES), width_multiplier=width)


def segnet_basic_loss(network, images, labels):
    return fastseg.ops.cross_entropy_dice(network(images), labels, ignore_index=IGNORE)


def segnet_basic_predict(network, images):
    return network(images).argmax(1).to(torch.uint8)


def build_named(name):
    """Builds a network of `fastseg.models` so that it trains from random weights: everything is normalised."""

    def build(width):
        options = {"num_classes": len(CLASSES), "in_channels": 3, "width_multiplier": width, "dropout": 0.0}
        known = inspect.signature(registry.MODELS[name].network).parameters
        if "norm" in known:
            options["norm"] = "batch"  # the default of some is the release's, which begins with ImageNet's statistics
        if "padding" in known:
            options["padding"] = "same"  # the releases of FCN pad by 100 pixels, most of the work for a small image
        network = fastseg.models.build(name, **{key: value for key, value in options.items() if key in known})
        norms = [layer for layer in network.modules() if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm))]
        for layer in norms:
            layer.momentum = 0.1  # DeepLab's 0.0003 takes thousands of steps to find the statistics
        return network if norms else with_batch_norms(network)

    return build


def named_loss(network, images, labels):
    """The network's own loss; four pixels of five are background, which counts less so that digits are learned soon."""
    weight = torch.ones(len(CLASSES), device=images.device)
    weight[0] = BACKGROUND_WEIGHT
    return network.loss(images, labels, ignore_index=IGNORE, weight=weight)


def choice_of(name):
    """The choice of that name; any network of `fastseg.models` that takes images is one."""
    if name in CHOICES:
        return CHOICES[name]
    return Choice(
        title=name,
        picture=f"digits_{name}.png",
        build=build_named(name),
        loss=named_loss,
        predict=lambda network, images: network.predict(images),
        width=1.0 if registry.MODELS[name].network is UNetAarhus else 0.125,
        steps=800,
        batch=16,
        learning_rate=2e-3 if registry.MODELS[name].network in SLOW else 8e-3,
        comparison=(stock_upsampling_network, "and upsampling fused", fuse_by_hand),
    )


CHOICES = {
    "fcn": Choice(
        title="FCN-8s",
        picture="digits.png",
        build=build_fcn8s,
        loss=fcn8s_loss,
        predict=fcn8s_predict,
        width=0.125,
        steps=800,
        batch=16,
        learning_rate=4e-3,
        comparison=(stock_upsampling_network, "and upsampling fused", fuse_by_hand),
    ),
    "segnet_basic": Choice(
        title="SegNet-Basic",
        picture="digits_segnet_basic.png",
        build=build_segnet_basic,
        loss=segnet_basic_loss,
        predict=segnet_basic_predict,
        width=0.25,
        steps=1200,
        batch=16,
        learning_rate=1.6e-2,
        comparison=(StockUnpoolingNetwork, "but int64 indices", make_indices_flat_by_hand),
    ),
}
# all that take images of a scene's size
NAMES = (
    *CHOICES,
    *(
        name
        for name, entry in registry.MODELS.items()
        if entry.network is not ContextModule and entry.network.smallest_image <= SIDE and name not in CHOICES
    ),
)
