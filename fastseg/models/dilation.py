"""The dilated front-end on VGG16 and the context module.

Yu, Koltun: Multi-scale context aggregation by dilated convolutions (2016). The front-end scores every 8th pixel; the
context module looks at ever larger neighbourhoods of the scores. Parameter names are those of the Caffe release (whose
networks for PASCAL VOC call ``final`` ``fc-final`` and begin the names of the context module with ``ct_``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseg.models.blocks.heads import score_layer
from fastseg.models.blocks.mirroring import mirrored
from fastseg.models.blocks.vgg16 import (
    FC6,
    FULLY_CONNECTED_CHANNELS,
    DilatedVGG16,
    convolution_names,
    numbered,
    torchvision_sources,
)
from fastseg.models.coarse import SubsampledNetwork
from fastseg.models.network import Network
from fastseg.nn import Conv2d, MaxPool2d

MARGIN = 186  # pixels that layers without padding take from each side of an image
PADDINGS = ("valid", "same")
FINAL_DEVIATION = 0.001  # of the initial weights of the front-end's scores

DILATION7 = (1, 1, 2, 4, 8, 1)  # of the 3x3 convolutions, in the release for KITTI
DILATION8 = (1, 1, 2, 4, 8, 16, 1)  # PASCAL VOC, CamVid
DILATION10 = (1, 1, 2, 4, 8, 16, 32, 64, 1)  # Cityscapes
LARGE = (2, 2, 4, 8, 16, 32, 32)  # channels per class of the 3x3 convolutions
KINDS = ("basic", "large")
CONTEXT_PADDINGS = ("same", "first")
CONTEXT_DEVIATION = 0.01  # of the noise in the initial weights


class ContextModule(Network):
    """3x3 convolutions of growing dilation on score maps, whose size they keep, and a last one of 1x1.

    Called on scores (N, num_classes, h, w) it returns scores of the same shape. Keys: ``ctx_conv1_1``,
    ``ctx_conv1_2``, ``ctx_conv2_1``, ... ``ctx_fc1``, ``ctx_final``.

    It starts as the identity of non-negative scores (negative ones become 0) with a little noise: the centre of each
    kernel connects channels of the same class.

    Args:
        num_classes: classes, background included.
        kind: "basic" (every layer has num_classes channels) or "large" (up to 32 times as many).
        dilations: of the 3x3 convolutions: `DILATION7`, `DILATION8` or `DILATION10`; `DILATION8` for "large".
        padding: "same" pads every layer by its dilation; "first" pads the first by all of them together and no other.
        deviation: of the noise; divided by the channels per class.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the scores do not have shape (N, num_classes, h, w).
    """

    def __init__(
        self,
        num_classes: int = 21,
        *,
        kind: str = "basic",
        dilations: Sequence[int] = DILATION8,
        padding: str = "same",
        deviation: float = CONTEXT_DEVIATION,
    ):
        super().__init__(num_classes, in_channels=num_classes)
        self.check_one_of(KINDS, kind=kind)
        self.check_one_of(CONTEXT_PADDINGS, padding=padding)
        allowed = (DILATION7, DILATION8, DILATION10) if kind == "basic" else (DILATION8,)
        self.check_one_of(allowed, dilations=tuple(dilations))
        factors = LARGE if kind == "large" else (1,) * len(dilations)
        names = ["conv1_1", "conv1_2", *(f"conv{stage}_1" for stage in range(2, len(dilations) - 1)), "fc1"]
        channels = num_classes
        for place, (name, dilation, factor) in enumerate(zip(names, dilations, factors)):
            inset = dilation if padding == "same" else sum(dilations) if place == 0 else 0
            layer = Conv2d(channels, factor * num_classes, 3, padding=inset, dilation=dilation)
            channels = factor * num_classes
            self.add_module(f"ctx_{name}", initialise_identity_(layer, num_classes, deviation))
        self.ctx_final = initialise_identity_(Conv2d(channels, num_classes, 1), num_classes, deviation)

    def forward(self, scores: Tensor) -> Tensor:
        self.check_image(scores)
        *layers, last = self.children()
        for layer in layers:
            scores = layer(scores, activation="relu")
        return last(scores)


@torch.no_grad()
def initialise_identity_(layer: nn.Conv2d, groups: int, deviation: float) -> nn.Conv2d:
    """Noise, and in the centre of the kernels the identity between channels of the same group; zero biases.

    The channels of input and output are divided into so many groups of equal size. The centre is groups / channels of
    the output, so that a sum over a group is what it was before the layers that multiplied the channels.
    """
    weight = layer.weight
    nn.init.normal_(weight, std=deviation * groups / layer.out_channels)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    leaving, entering = (torch.arange(count) * groups // count for count in weight.shape[:2])
    row, column = (size // 2 for size in layer.kernel_size)
    same_group = (leaving[:, None] == entering).to(weight.device)
    weight[:, :, row, column].masked_fill_(same_group, groups / layer.out_channels)
    return layer


class DilationFrontEnd(SubsampledNetwork):
    """The dilated front-end, called on an image (N, in_channels, H, W): class scores (N, num_classes, H, W).

    VGG16 without its last two poolings: the convolutions after them have dilation 2, ``fc6`` has 4. Scores are those
    of every 8th pixel, and `loss` takes every 8th label, as the release does.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        padding: "valid" (no layer is padded; the image is mirrored at its borders, by 186 pixels) or "same" (every
            layer is padded).
        context: None, or a context module after the scores: "basic" or "large", see `ContextModule`.
        width_multiplier: scales the width of every layer before the scores; 1 is VGG16.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.

    Convolutions start from He's normal initialisation or from `load_imagenet`, ``final`` from a normal distribution of
    deviation 0.001.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        padding: str = "valid",
        context: str | None = None,
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(PADDINGS, padding=padding)
        self.check_one_of((None, *KINDS), context=context)
        padded = padding == "same"
        self.margin = 0 if padded else MARGIN
        pools = [MaxPool2d(2, 2, ceil_mode=True) for _ in range(3)]
        self.backbone = DilatedVGG16(
            in_channels,
            width_multiplier,
            pools=[*pools, nn.Identity(), nn.Identity()],
            padded=padded,
            fully_connected=[FC6(FULLY_CONNECTED_CHANNELS, 7, padding=12 if padded else 0, dilation=4)],
            dropout=dropout,
        )
        self.final = score_layer(self.backbone.channels, num_classes, deviation=FINAL_DEVIATION)
        self.context = None if context is None else ContextModule(num_classes, kind=context)

    def release_names(self) -> dict[str, str]:
        names = {f"backbone.branches.0.{layer}": layer for layer in ("fc6", "fc7")}
        if self.context is not None:
            names |= {f"context.{name}": name for name, _ in self.context.named_children()}
        return convolution_names("backbone.stages") | names

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "DilationFrontEnd":
        """Copies the weights of torchvision's ``vgg16``; its fully connected layers become convolutions.

        ImageNet's output layer, ``classifier.6``, is ignored. torchvision's weights expect RGB images in [0, 1],
        normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        layers = [*(f"conv{stage}_{layer}" for stage, layer in numbered()), "fc6", "fc7"]
        self.copy_tensors("load_imagenet", state_dict, torchvision_sources(state_dict, dict.fromkeys(layers)))
        return self

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.margin:
            image = mirrored(image, (self.margin, self.margin), (self.margin, self.margin))
        _, (features,) = self.backbone(image)
        scores = self.final(features)
        return (scores if self.context is None else self.context(scores),)
