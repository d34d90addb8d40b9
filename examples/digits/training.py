"""Trains a narrow FCN-8s on the digit scenes and measures it on held-out ones."""

import torch
from torch import nn
from tqdm import tqdm

import fastseg
from examples.digits.scenes import CLASSES, IGNORE, normalised


def build_network(width):
    """FCN-8s whose every layer is ``width`` times as wide as VGG16's.

    A batch normalisation after each trunk convolution lets it learn from nothing in a few hundred steps.
    """
    network = fastseg.models.FCN8s(
        len(CLASSES), padding="same", upsampling="interp", width_multiplier=width, dropout=0.0
    )
    for name, layer in list(network.named_children()):
        if name.startswith(("conv", "fc")):
            setattr(network, name, nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)))
    return network.to(memory_format=torch.channels_last)


def train(network, images, labels, steps, batch, learning_rate, report):
    """Minimise cross-entropy + Dice over random batches; calls ``report(step)`` five times on the way."""
    optimiser = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, steps, pct_start=0.15)
    network.train()
    bar = tqdm(range(1, steps + 1), desc="training", unit="step")
    for step in bar:
        chosen = torch.randint(len(images), (batch,))
        scores = network.coarse_scores(normalised(images[chosen]))  # at an eighth of the resolution
        loss = fastseg.ops.upsample_cross_entropy_dice(scores, labels[chosen], ignore_index=IGNORE)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % max(1, steps // 5) == 0:
            report(step)
            network.train()


@torch.no_grad()
def predict(network, images, batch=32):
    """The most probable class of every pixel: uint8 ``(N, H, W)``; the full-size scores never exist."""
    network.eval()
    return torch.cat(
        [
            fastseg.ops.upsample_argmax(
                network.coarse_scores(normalised(part)), size=part.shape[2:], dtype=torch.uint8
            )
            for part in images.split(batch)
        ]
    )


def evaluate(network, images, labels):
    """Every metric of `fastseg.metrics` by its name, over all the images."""
    metrics = fastseg.metrics.SegmentationMetrics(len(CLASSES), ignore_index=IGNORE)
    metrics.update(predict(network, images), labels)
    return metrics.compute()


def summary(measured):
    return f"pixel accuracy {measured['pixel_accuracy']:.3f}, mIoU {measured['mean_iou']:.3f}"
