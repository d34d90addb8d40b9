"""Shared by the ops on regions of interest: checks, and boxes as rows (batch index, x1, y1, x2, y2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._dtypes import FLOATING, HALF
from fastseg._layout import image_format
from fastseg._private_api import in_functional_transform

ROWS = "batch index, x1, y1, x2, y2; or a list of one (L, 4) tensor an image"


def check_input(op: str, name: str, input: Tensor) -> None:
    _check.dtype(op, name, input, FLOATING)
    shape = input.shape
    if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
        raise RuntimeError(f"fastseg.ops.{op}: {name} has shape {tuple(shape)}; allowed: (N, C, H, W), empty in N only")


def check_boxes(op: str, boxes: Tensor, input: Tensor) -> None:
    _check.argument(op, "boxes", boxes, FLOATING, ("K", 5), ROWS, like=("input", input))


def check_grad_output(op: str, grad_output: Tensor, boxes: Tensor) -> None:
    _check.dtype(op, "grad_output", grad_output, FLOATING)
    _check.shape(op, "grad_output", grad_output, (boxes.shape[0], "C", "rows", "columns"))
    _check.argument(op, "boxes", boxes, FLOATING, ("K", 5), like=("grad_output", grad_output))


def check_output_size(op: str, output_size: Sequence[int]) -> None:
    rows, columns = output_size
    if rows < 1 or columns < 1:
        raise RuntimeError(f"fastseg.ops.{op}: output_size={tuple(output_size)}; allowed: 1 or more")


def as_rows(op: str, boxes: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """Boxes as (K, 5) without gradient. In a list, the place of a tensor is its batch index."""
    if isinstance(boxes, Tensor):
        return boxes.detach() if boxes.requires_grad else boxes
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"fastseg.ops.{op}: boxes is {type(boxes).__name__}; allowed: torch.Tensor, or a list of them")
    if len(boxes) != input.shape[0]:
        given = f"boxes is a list of {len(boxes)}"
        raise RuntimeError(f"fastseg.ops.{op}: {given}; allowed: one tensor for each of the {input.shape[0]} images")
    rows = [input.new_empty((0, 5), dtype=torch.float32)]
    for image, own in enumerate(boxes):
        name = f"boxes[{image}]"
        _check.argument(op, name, own, FLOATING, ("L", 4), "x1, y1, x2, y2", like=("input", input))
        own = own.detach().float() if own.dtype in HALF else own.detach()  # half types round large batch indices
        rows.append(torch.cat([torch.full_like(own[:, :1], image), own], 1))
    return torch.cat(rows)


def without_image(boxes: Tensor, images: int) -> Tensor:
    """Which boxes have a batch index without an image."""
    index = boxes[:, 0]
    return ~((index > -1) & (index < images))


def invalid_index(op: str, boxes: Tensor, images: int) -> Tensor:
    """The same; raises on CPU if there are any."""
    index, invalid = boxes[:, 0], without_image(boxes, images)
    if _check.may_look_at(boxes) and invalid.any():
        first = int(invalid.nonzero()[0])
        allowed = f"0 to {images - 1}" if images else "no box, input is an empty batch"
        raise IndexError(
            f"fastseg.ops.{op}: boxes[{first}] has batch index {index[first].item():g}; allowed: {allowed}"
        )
    return invalid


def is_channels_last(input: Tensor) -> bool:
    """Whether an op returns channels_last. Transforms of torch.func hide the strides of tensors: then False."""
    return not in_functional_transform() and image_format(input) is torch.channels_last


def empty(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised tensor of four dimensions."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
