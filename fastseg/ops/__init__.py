"""The functional ops, one line each."""
from fastseg.ops.binary_cross_entropy_dice import binary_cross_entropy_dice
from fastseg.ops.confusion_matrix import confusion_matrix
from fastseg.ops.convolution import conv_transpose2d, dilated_conv2d
from fastseg.ops.cross_entropy import cross_entropy, focal_loss
from fastseg.ops.cross_entropy_dice import cross_entropy_dice, dice_loss
from fastseg.ops.pooling.indices import PoolIndices
from fastseg.ops.pooling.max_pool2d import max_pool2d
from fastseg.ops.pooling.max_unpool2d import max_unpool2d
from fastseg.ops.roi_align import multiscale_roi_align, roi_align
from fastseg.ops.roi_pool import roi_pool
from fastseg.ops.sigmoid_focal_loss import sigmoid_focal_loss
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_bilinear2d import upsample_bilinear2d
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_dice

__all__ = [
    "PoolIndices",
    "binary_cross_entropy_dice",
    "confusion_matrix",
    "conv_transpose2d",
    "cross_entropy",
    "cross_entropy_dice",
    "dice_loss",
    "dilated_conv2d",
    "focal_loss",
    "max_pool2d",
    "max_unpool2d",
    "multiscale_roi_align",
    "roi_align",
    "roi_pool",
    "sigmoid_focal_loss",
    "upsample_argmax",
    "upsample_bilinear2d",
    "upsample_cross_entropy",
    "upsample_cross_entropy_dice",
]
