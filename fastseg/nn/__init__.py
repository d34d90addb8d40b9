"""Modules that call `fastseg.ops`: drop-ins for those of ``torch.nn``, and other losses."""

from fastseg.nn.aspp import ASPP
from fastseg.nn.class_balance import ClassBalancedCrossEntropyLoss, median_frequency_weights
from fastseg.nn.convolution import BilinearUpsample2d, Conv2d, ConvTranspose2d
from fastseg.nn.cross_entropy import CrossEntropyLoss
from fastseg.nn.cross_entropy_dice import CrossEntropyDiceLoss, DiceLoss
from fastseg.nn.focal_loss import FocalLoss
from fastseg.nn.max_pool import MaxPool2d, MaxUnpool2d
from fastseg.nn.pyramid_pooling import PyramidPooling
from fastseg.nn.roi_align import MultiScaleRoIAlign, RoIAlign, RoIPool
from fastseg.nn.upsample import Upsample, UpsamplingBilinear2d
from fastseg.nn.upsample_cross_entropy import UpsampleCrossEntropyLoss

__all__ = [
    "ASPP",
    "BilinearUpsample2d",
    "ClassBalancedCrossEntropyLoss",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropyDiceLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "MaxPool2d",
    "MaxUnpool2d",
    "MultiScaleRoIAlign",
    "PyramidPooling",
    "RoIAlign",
    "RoIPool",
    "Upsample",
    "UpsampleCrossEntropyLoss",
    "UpsamplingBilinear2d",
    "median_frequency_weights",
]
