"""paste_masks, upsample_masks: from a network's soft masks directly to bits at the size of the image.

A network gives a small soft mask for each object: of its box (Mask R-CNN, 28 x 28) or of the whole image (Segment
Anything, SOLO, YOLACT, a quarter of its size). Mostly only the pixels whose interpolated value exceeds a threshold are
needed: a bit per pixel (`PackedMasks`), 1/32 of the (N, H, W) floats, which never exist here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, FLOATING_GPU
from fastseg._op import Op
from fastseg.kernels.paste_masks import reference
from fastseg.ops.masks.packed import PackedMasks, words_in_row

_NAME, _UPSAMPLE = "paste_masks", "upsample_masks"
CONVENTIONS = ("detectron2", "torchvision")
OUTPUTS = ("packed", "bool", "soft")  # in the order of reference.PACKED, BOOLEAN, SOFT
_MOST = 2**31 - 65  # rows or columns


def check_masks(op: str, name: str, masks) -> None:
    _check.argument(op, name, masks, FLOATING, ("N", "h", "w"))
    if masks.shape[1] == 0 or masks.shape[2] == 0:
        shape = tuple(masks.shape)
        raise RuntimeError(f"fastseg.ops.{op}: {name} has shape {shape}; allowed: (N, h, w), h and w not 0")


def empty_output(like: Tensor, height, width, form: int) -> Tensor:
    """An uninitialised output of the form."""
    if form == reference.PACKED:
        return like.new_empty((like.shape[0], height, words_in_row(width)), dtype=torch.int32)
    dtype = torch.bool if form == reference.BOOLEAN else torch.promote_types(like.dtype, torch.float32)
    return like.new_empty((like.shape[0], height, width), dtype=dtype)


def check(masks, boxes):
    check_masks(_NAME, "masks", masks)
    _check.argument(_NAME, "boxes", boxes, FLOATING, (masks.shape[0], 4), "a box per mask", like=("masks", masks))


def outputs(masks, height, width, form):
    return empty_output(masks, height, width, form)


paste_masks_op = Op(
    "paste_masks(Tensor masks, Tensor boxes, SymInt height, SymInt width, float threshold, bool torchvision, int form)"
    " -> Tensor output",
    check=check,
    outputs=outputs,
    internal=True,
    contiguous=("masks",),
    accumulated=("boxes",),
    backends=rows(reference.paste_masks, cpu=FLOATING_GPU, cuda=FLOATING_GPU),
)


def check_upsample(logits, padded_size, input_size):
    check_masks(_UPSAMPLE, "logits", logits)
    for axis in (0, 1):
        if input_size[axis] > padded_size[axis]:
            raise ValueError(
                f"fastseg.ops.{_UPSAMPLE}: input_size={tuple(input_size)}; allowed: up to padded_size, "
                f"{tuple(padded_size)}"
            )


def outputs_upsample(logits, height, width, form):
    return empty_output(logits, height, width, form)


upsample_masks_op = Op(
    "upsample_masks(Tensor logits, SymInt[] padded_size, SymInt[] input_size, SymInt height, SymInt width,"
    " float threshold, int form) -> Tensor output",
    check=check_upsample,
    outputs=outputs_upsample,
    contiguous=("logits",),
    backends=rows(reference.upsample_masks, cpu=FLOATING_GPU, cuda=FLOATING_GPU),
)


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_shape: Sequence[int],
    *,
    threshold: float = 0.5,
    convention: str = "detectron2",
    output: str = "packed",
    backend: str = "auto",
) -> PackedMasks | Tensor:
    """Pastes soft masks of boxes into an image, as detectron2.layers.mask_ops.paste_masks_in_image or torchvision's.

    Bilinear, align_corners=False, with zeros around each mask. A mask reaches half a cell beyond its box; where its
    values are 1 at most and the threshold is 0.5 or more, no pixel outside of the box belongs to it.

    Args:
        masks: (N, h, w) or (N, 1, h, w), values mostly in 0 to 1; float32, float16, bfloat16 (computed in fp32) or
            float64 (by the reference), any strides, N >= 0.
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the image, of any floating dtype. They may reach beyond the image. A
            box with a NaN or an infinite corner, or without area, gets no pixel; in torchvision's convention one of no
            width or height gets a line, and one with x2 < x1 or y2 < y1 none.
        image_shape: (H, W).
        threshold: 0 to 1.
        convention: "detectron2": pixel centres p + 0.5 sample the mask in the box; a pixel belongs to the mask if its
            value is >= threshold. "torchvision" (and Detectron): they sample the mask with a border of zeros in the
            box, which is grown in proportion and cut to integers; > threshold.
        output: "packed", "bool" or "soft".
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        `PackedMasks` of N masks of H x W pixels; bool (N, H, W); or the interpolated values (N, H, W) in the dtype of
        masks, whatever the threshold. Not differentiable; the same on every device and run.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; masks of size 0.
        ValueError: an image_shape that is not positive; a threshold that is NaN or not in 0 to 1; another convention or
            output.
        TypeError: arguments of other types.
    """
    masks = _planes(_NAME, "masks", masks)
    check(masks, boxes)
    height, width = _size(_NAME, "image_shape", image_shape)
    threshold = _check.number(_NAME, "threshold", threshold)
    _check.in_range(_NAME, "threshold", threshold, 0, 1)
    _check.one_of(_NAME, "convention", convention, CONVENTIONS)
    _check.one_of(_NAME, "output", output, OUTPUTS)
    result = paste_masks_op(
        masks.detach(),
        boxes.detach(),
        height,
        width,
        threshold,
        convention == "torchvision",
        OUTPUTS.index(output),
        backend=backend,
    )
    return _finished(result, output, masks, width)


def upsample_masks(
    logits: Tensor,
    size: Sequence[int],
    *,
    padded_size: Sequence[int] | None = None,
    input_size: Sequence[int] | None = None,
    threshold: float = 0.0,
    output: str = "packed",
    backend: str = "auto",
) -> PackedMasks | Tensor:
    """Interpolates masks of the whole image to its size and compares them with a threshold.

    Equal to

        x = interpolate(logits, padded_size, mode="bilinear")[..., :input_height, :input_width]
        interpolate(x, size, mode="bilinear") > threshold

    with torch.nn.functional.interpolate, but in one step. Segment Anything's `postprocess_masks(masks, input_size,
    original_size)` is `upsample_masks(masks, original_size, padded_size=(1024, 1024), input_size=input_size)`.

    Args:
        logits: (N, h, w) or (N, 1, h, w): float32, float16, bfloat16 (computed in fp32) or float64 (by the reference),
            any strides, N >= 0.
        size: (H, W) of the result.
        padded_size: size to which the logits are interpolated first; None: they are not.
        input_size: the part of padded_size, from its upper left corner, that shows the image (networks pad images at
            the right and at the bottom); None: all.
        threshold: a pixel belongs to its mask if its value is > threshold.
        output: "packed", "bool" or "soft".
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        `PackedMasks` of N masks of H x W pixels; bool (N, H, W); or the interpolated values (N, H, W) in the dtype of
        logits. Not differentiable; the same on every device and run.

    Raises:
        RuntimeError: a shape or dtype that does not fit; masks of size 0.
        ValueError: sizes that are not positive, an input_size above padded_size; a threshold that is NaN; another
            output.
        TypeError: arguments of other types.
    """
    logits = _planes(_UPSAMPLE, "logits", logits)
    check_masks(_UPSAMPLE, "logits", logits)
    height, width = _size(_UPSAMPLE, "size", size)
    padded = [*logits.shape[1:]] if padded_size is None else _size(_UPSAMPLE, "padded_size", padded_size)
    shown = padded if input_size is None else _size(_UPSAMPLE, "input_size", input_size)
    threshold = _check.number(_UPSAMPLE, "threshold", threshold)
    if threshold != threshold:
        raise ValueError(f"fastseg.ops.{_UPSAMPLE}: threshold=nan; allowed: a number that is not NaN")
    _check.one_of(_UPSAMPLE, "output", output, OUTPUTS)
    result = upsample_masks_op(
        logits.detach(), padded, shown, height, width, threshold, OUTPUTS.index(output), backend=backend
    )
    return _finished(result, output, logits, width)


def _planes(op: str, name: str, masks) -> Tensor:
    """(N, 1, h, w) as (N, h, w)."""
    _check.tensor(op, name, masks)
    return masks[:, 0] if masks.dim() == 4 and masks.shape[1] == 1 else masks


def _size(op: str, name: str, size: Sequence[int]) -> list[int]:
    values = _check.integers(op, name, size, "(height, width)")
    if len(values) != 2:
        raise ValueError(f"fastseg.ops.{op}: {name}={size!r}; allowed: (height, width)")
    for value in values:
        if value < 1 or value > _MOST:
            raise ValueError(f"fastseg.ops.{op}: {name}={tuple(values)}; allowed: 1 to {_MOST} for each")
    return values


def _finished(result: Tensor, output: str, masks: Tensor, width: int) -> PackedMasks | Tensor:
    if output == "packed":
        return PackedMasks._of(result, width)
    return result.to(masks.dtype) if output == "soft" else result
