"""pack_masks and unpack_masks: binary masks between one byte (or float) and one bit per pixel.

Bit b of word w of a row is pixel x = 32 w + b; the bits past the end of a row are 0. A mask of 480 x 640 takes 38 KB,
and ops on many masks (IoU, suppression, boxes) read 32 pixels at a time.
"""

import math

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING
from fastseg._op import Op
from fastseg.kernels.pack_masks import reference
from fastseg.ops.masks.packed import MOST_ON_A_SIDE, PackedMasks, words_in_row

_NAME = "pack_masks"
BINARY = (torch.bool, torch.uint8)
UNPACKED = (*BINARY, *FLOATING)


def check(masks, threshold):
    _check.dtype(_NAME, "masks", masks, UNPACKED)
    _check.shape(_NAME, "masks", masks, ("N", "H", "W"))
    if not torch.compiler.is_compiling() and max(masks.shape[1:]) > MOST_ON_A_SIDE:
        size = " x ".join(map(str, masks.shape[1:]))
        raise ValueError(f"fastseg.ops.{_NAME}: masks are {size} pixels; allowed: at most {MOST_ON_A_SIDE} on a side")
    if threshold is None and masks.dtype not in BINARY:
        raise ValueError(f"fastseg.ops.{_NAME}: threshold=None; allowed with floating masks: a number")
    if threshold is not None and masks.dtype == torch.bool:
        raise ValueError(f"fastseg.ops.{_NAME}: threshold={threshold}; allowed with bool masks: None")
    if threshold is not None and math.isnan(threshold):
        raise ValueError(f"fastseg.ops.{_NAME}: threshold={threshold}; allowed: a number that is not NaN")


def outputs(masks):
    count, height, width = masks.shape
    words = masks.new_empty((count, height, words_in_row(width)), dtype=torch.int32)
    return words, words.new_empty(count, dtype=torch.int64), words.new_empty((count, 4))


pack_masks_op = Op(
    "pack_masks(Tensor masks, float? threshold) -> (Tensor words, Tensor area, Tensor boxes)",
    check=check,
    outputs=outputs,
    backends=rows(reference.pack_masks, cpu=UNPACKED, cuda=UNPACKED),
)


def pack_masks(masks: Tensor, threshold: float | None = None, *, backend: str = "auto") -> PackedMasks:
    """Packs binary masks to one bit per pixel, and finds the area and tight box of each in the same pass.

    Args:
        masks: (N, H, W), (N, 1, H, W), or (H, W) for a single mask; bool, uint8, float32, float16, bfloat16 or float64.
            Any strides; where pixels of a row do not follow each other in memory a copy is made.
        threshold: a pixel belongs to its mask if its value is `> threshold`, by PyTorch's ``masks > threshold`` (NaN
            does not). Required with floating masks. None, with bool and uint8 masks: if it is not 0.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        `PackedMasks` of N masks on the same device. Not differentiable.

    Raises:
        RuntimeError: a dtype or shape that is not listed.
        ValueError: floating masks without threshold, bool masks with one, a threshold that is NaN, 2^31 pixels or more
            in a row or a column.
        TypeError: arguments of other types.
    """
    _check.tensor(_NAME, "masks", masks)
    threshold = None if threshold is None else _check.number(_NAME, "threshold", threshold)
    shape = masks.shape
    if len(shape) == 2:
        masks = masks.unsqueeze(0)
    elif len(shape) == 4 and shape[1] == 1:
        masks = masks.squeeze(1)
    elif len(shape) != 3:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: masks has shape {tuple(shape)}; allowed: (N, H, W), (N, 1, H, W) or (H, W)"
        )
    words, area, boxes = pack_masks_op(masks.detach(), threshold, backend=backend)
    return PackedMasks._of(words, masks.shape[2], area, boxes)


def check_unpacked(words, width, dtype):
    _check.argument("unpack_masks", "words", words, (torch.int32,), ("N", "H", words_in_row(width)))
    _check.one_of("unpack_masks", "dtype", dtype, UNPACKED)


def unpacked(words, width, dtype):
    return words.new_empty((words.shape[0], words.shape[1], width), dtype=dtype)


unpack_masks_op = Op(
    "unpack_masks(Tensor words, SymInt width, ScalarType dtype) -> Tensor masks",
    check=check_unpacked,
    outputs=unpacked,
    contiguous=("words",),
    backends=rows(reference.unpack_masks, cpu=(torch.int32,), cuda=(torch.int32,)),
)


def unpack_masks(packed: PackedMasks, dtype: torch.dtype = torch.bool, *, backend: str = "auto") -> Tensor:
    """The masks as a tensor with an element per pixel, the inverse of `pack_masks`.

    Args:
        packed: `PackedMasks` of N masks.
        dtype: bool, uint8, float32, float16, bfloat16 or float64.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        (N, H, W) of zeros and ones (False and True), contiguous, on the same device.

    Raises:
        TypeError: `packed` is no `PackedMasks`.
        ValueError: another dtype.
    """
    check_packed("unpack_masks", "packed", packed)
    return unpack_masks_op(packed.words, packed.width, dtype, backend=backend)


def check_packed(op: str, name: str, value) -> None:
    if not isinstance(value, PackedMasks):
        raise TypeError(f"fastseg.ops.{op}: {name} is {type(value).__name__}; allowed: PackedMasks")


def packed_from(op: str, name: str, masks: PackedMasks | Tensor) -> PackedMasks:
    """`masks` if it is `PackedMasks`; a bool or uint8 tensor is packed."""
    if isinstance(masks, PackedMasks):
        return masks
    if not isinstance(masks, Tensor):
        allowed = "PackedMasks, or a bool or uint8 torch.Tensor"
        raise TypeError(f"fastseg.ops.{op}: {name} is {type(masks).__name__}; allowed: {allowed}")
    _check.dtype(op, name, masks, BINARY)
    return pack_masks(masks)
