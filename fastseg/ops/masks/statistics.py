"""The op of `PackedMasks.area` and `PackedMasks.boxes`: the area and tight box of each mask."""

import torch

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.masks_to_boxes import reference

_NAME = "mask_statistics"


def check(words):
    _check.argument(_NAME, "words", words, (torch.int32,), ("N", "H", "words"))


def outputs(words):
    masks = words.shape[0]
    return words.new_empty(masks, dtype=torch.int64), words.new_empty((masks, 4))


mask_statistics_op = Op(
    "mask_statistics(Tensor words) -> (Tensor area, Tensor boxes)",
    check=check,
    outputs=outputs,
    internal=True,
    contiguous=("words",),
    backends=rows(reference.mask_statistics, cpu=(torch.int32,), cuda=(torch.int32,)),
)
