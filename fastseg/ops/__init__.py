"""The functional ops."""

from fastseg.ops.binary_cross_entropy_dice import binary_cross_entropy_dice
from fastseg.ops.confusion_matrix import confusion_matrix
from fastseg.ops.convolution import conv_transpose2d, dilated_conv2d
from fastseg.ops.cross_entropy import cross_entropy, focal_loss
from fastseg.ops.cross_entropy_dice import cross_entropy_dice, dice_loss
from fastseg.ops.masks.mask_iou import mask_iou
from fastseg.ops.masks.mask_nms import mask_nms
from fastseg.ops.masks.masks_to_boxes import masks_to_boxes
from fastseg.ops.masks.matrix_nms import matrix_nms
from fastseg.ops.masks.pack_masks import pack_masks, unpack_masks
from fastseg.ops.masks.packed import PackedMasks
from fastseg.ops.masks.paste_masks import paste_masks, upsample_masks
from fastseg.ops.masks.run_lengths import masks_to_rle, rle_to_masks
from fastseg.ops.nms import batched_nms, nms
from fastseg.ops.pooling.indices import PoolIndices
from fastseg.ops.pooling.max_pool2d import max_pool2d
from fastseg.ops.pooling.max_unpool2d import max_unpool2d
from fastseg.ops.roi_align import multiscale_roi_align, roi_align
from fastseg.ops.roi_pool import roi_pool
from fastseg.ops.sigmoid_focal_loss import sigmoid_focal_loss
from fastseg.ops.soft_nms import soft_nms
from fastseg.ops.upsample_argmax import upsample_argmax
from fastseg.ops.upsample_bilinear2d import upsample_bilinear2d
from fastseg.ops.upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_dice

__all__ = [
    "PackedMasks",
    "PoolIndices",
    "batched_nms",
    "binary_cross_entropy_dice",
    "confusion_matrix",
    "conv_transpose2d",
    "cross_entropy",
    "cross_entropy_dice",
    "dice_loss",
    "dilated_conv2d",
    "focal_loss",
    "mask_iou",
    "mask_nms",
    "masks_to_boxes",
    "masks_to_rle",
    "matrix_nms",
    "max_pool2d",
    "max_unpool2d",
    "multiscale_roi_align",
    "nms",
    "pack_masks",
    "paste_masks",
    "rle_to_masks",
    "roi_align",
    "roi_pool",
    "sigmoid_focal_loss",
    "soft_nms",
    "unpack_masks",
    "upsample_argmax",
    "upsample_bilinear2d",
    "upsample_cross_entropy",
    "upsample_cross_entropy_dice",
    "upsample_masks",
]
