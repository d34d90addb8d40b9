"""Blocks of a layer, normalisation and ReLU; widths and initialisation of layers."""

from collections import OrderedDict
from typing import TypeVar

from torch import nn

Layer = nn.Conv2d | nn.ConvTranspose2d
Module = TypeVar("Module", bound=nn.Module)


def layer_block(layer: nn.Module, *, norm: nn.Module | None = None, relu: bool = True) -> nn.Sequential:
    """``layer``, then ``norm``, then a ReLU, as modules named "layer", "norm" and "relu"."""
    parts = OrderedDict(layer=layer)
    if norm is not None:
        parts["norm"] = norm
    if relu:
        parts["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)


def scaled_width(channels: int, multiplier: float) -> int:
    """``channels * multiplier``, rounded, at least 1."""
    return max(1, round(channels * multiplier))


def initialise_he_(layer: Layer) -> Layer:
    """He's normal initialisation (fan in, ReLU gain; Caffe's "msra") and zero biases."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def initialise_all_he_(module: Module) -> Module:
    """`initialise_he_` of every convolution of ``module``."""
    for layer in module.modules():
        if isinstance(layer, Layer):
            initialise_he_(layer)
    return module
