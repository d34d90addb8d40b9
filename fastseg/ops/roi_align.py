"""roi_align: each box of a feature map resampled to a fixed number of bins; and the same over a pyramid of maps.

    output[k, c] = A_k input[n_k, c] B_k^T

Row p of A_k holds the weight of each row of cells in bin p of box k: the mean of the bilinear weights of its samples;
B_k is the same for columns. Both are narrow bands, used forward and backward: the gradient

    grad_input[n, c] = sum over the boxes k of image n of A_k^T grad_output[k, c] B_k

is gathered cell by cell, in the order of the boxes. Each op is the other's derivative. Source: He et al., Mask R-CNN;
samples and border as in torchvision.ops.roi_align.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING_GPU
from fastseg._op import Op
from fastseg._rois import (
    as_rows,
    check_boxes,
    check_grad_output,
    check_input,
    check_output_size,
    empty,
    is_channels_last,
)
from fastseg.kernels.roi_align import reference

_NAME = "roi_align"
MOST_LEVELS = 5
MOST_SAMPLES = 1024  # along one axis of a bin
# spatial_scales: one per level. level_areas[l]: the least area, in the image, of the boxes of level l + 1.
_SAMPLING = "float[] spatial_scales, float[] level_areas, int sampling_ratio, bool aligned, bool channels_last"


def check(input, input1, input2, input3, input4, boxes, output_size, spatial_scales, level_areas):
    check_input(_NAME, "input", input)
    levels = 1
    for level in (input1, input2, input3, input4):
        if level is not None:
            name = f"inputs[{levels}]"
            check_input(_NAME, name, level)
            shape = *input.shape[:2], "H", "W"
            _check.argument(_NAME, name, level, (input.dtype,), shape, "as inputs[0]", like=("inputs[0]", input))
            levels += 1
    check_boxes(_NAME, boxes, input)
    check_output_size(_NAME, output_size)
    if len(spatial_scales) != levels or len(level_areas) != levels - 1:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: {len(spatial_scales)} spatial_scales and {len(level_areas)} level_areas; "
            f"allowed for {levels} inputs: {levels} and {levels - 1}"
        )


def outputs(input, boxes, output_size, channels_last):
    return empty(input, (boxes.shape[0], input.shape[1], *output_size), channels_last)


def backward(
    shape_input, shape_input1, shape_input2, shape_input3, shape_input4, boxes, spatial_scales, level_areas,
    sampling_ratio, aligned, channels_last, grad_output, backend
):  # fmt: skip
    sizes = [shape_input[0]]
    for shape in (shape_input, shape_input1, shape_input2, shape_input3, shape_input4)[: len(spatial_scales)]:
        sizes += shape[2:]
    gradients = roi_align_backward(
        grad_output, boxes, sizes, spatial_scales, level_areas, sampling_ratio, aligned, channels_last, backend=backend
    )
    return dict(zip(_INPUTS, gradients[: len(spatial_scales)]))


_INPUTS = "input", "input1", "input2", "input3", "input4"

roi_align_op = Op(
    "roi_align(Tensor input, Tensor? input1, Tensor? input2, Tensor? input3, Tensor? input4, Tensor boxes,"
    f" SymInt[] output_size, {_SAMPLING}) -> Tensor output",
    check=check,
    outputs=outputs,
    backward=backward,
    accumulated=("boxes",),
    image_layout=_INPUTS,
    backends=rows(reference.roi_align, cuda=FLOATING_GPU),
)


def check_backward(grad_output, boxes, sizes, spatial_scales):
    name = "roi_align_backward"
    check_grad_output(name, grad_output, boxes)
    if len(sizes) != 1 + 2 * len(spatial_scales):
        raise RuntimeError(f"fastseg.ops.{name}: sizes={[*sizes]}; allowed: N, then H and W of each level")


def outputs_backward(grad_output, sizes, channels_last):
    images, channels = sizes[0], grad_output.shape[1]
    planes = zip(sizes[1::2], sizes[2::2])
    levels = [empty(grad_output, (images, channels, *plane), channels_last) for plane in planes]
    return *levels, *[grad_output.new_empty(0) for _ in range(MOST_LEVELS - len(levels))]


def double_backward(
    shape_grad_output, boxes, spatial_scales, level_areas, sampling_ratio, aligned, channels_last, backend,
    grad_grad_input, grad_grad_input1, grad_grad_input2, grad_grad_input3, grad_grad_input4
):  # fmt: skip
    levels = grad_grad_input, grad_grad_input1, grad_grad_input2, grad_grad_input3, grad_grad_input4
    levels = [level if place < len(spatial_scales) else None for place, level in enumerate(levels)]
    sampling = spatial_scales, level_areas, sampling_ratio, aligned, channels_last
    return {"grad_output": roi_align_op(*levels, boxes, [*shape_grad_output[2:]], *sampling, backend=backend)}


roi_align_backward = Op(
    f"roi_align_backward(Tensor grad_output, Tensor boxes, SymInt[] sizes, {_SAMPLING}) -> (Tensor grad_input,"
    " Tensor grad_input1, Tensor grad_input2, Tensor grad_input3, Tensor grad_input4)",
    check=check_backward,
    outputs=outputs_backward,
    backward=double_backward,
    internal=True,
    accumulated=("boxes",),
    image_layout=("grad_output",),
    backends=rows(reference.roi_align_backward, cuda=FLOATING_GPU),
)


def _sampling(op: str, output_size, sampling_ratio, aligned) -> tuple[list[int], int]:
    """output_size and sampling_ratio, checked, as arguments of the op."""
    if type(aligned) is not bool:
        _check.booleans(op, aligned=aligned)
    (ratio,) = _check.integers(op, "sampling_ratio", sampling_ratio, "int")
    if ratio > MOST_SAMPLES:
        raise ValueError(
            f"fastseg.ops.{op}: sampling_ratio={ratio}; allowed: 1 to {MOST_SAMPLES}, or 0 and less for adaptive"
        )
    return _check.pair(op, "output_size", output_size), max(ratio, 0)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Mean of bilinear samples in each bin of each box; drop-in for torchvision.ops.roi_align.

    Args:
        input: (N, C, H, W), empty in N only; float32, float16, bfloat16 or float64; contiguous, channels_last or any
            other strides.
        boxes: (K, 5) rows (batch index, x1, y1, x2, y2) in pixels of the image, or a list of N tensors (L, 4), one
            for each image; any floating dtype. Where samples lie is computed in fp32 (for float64 input in fp64).
        output_size: bins (PH, PW), or one int for both.
        spatial_scale: cells of the feature map per pixel of the image, e.g. 1/16.
        sampling_ratio: samples along each axis of a bin, at most 1024. 0 or less: as many as the bin has cells,
            rounded up.
        aligned: True: the centre of the first cell is at 0.5 (shifted by half a cell, boxes may be of any size).
            False: it is at 0, and boxes are at least one cell wide and high.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        (K, C, PH, PW) in the dtype and memory format of input, summed in fp32 for half types. A sample more than one
        cell outside of the map is 0, as is all of a box that is not finite. Cells of weight 0 do not count, whatever
        they hold. Differentiable any number of times with respect to input (boxes get no gradient); the gradient is
        the same on every run.

    Raises:
        IndexError: on CPU a batch index outside of [0, N). On GPU, where checking would stall the stream, such boxes
            give 0.
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a spatial_scale that is not a positive number, a sampling_ratio above 1024.
        TypeError: arguments of other types.
    """
    if not isinstance(input, Tensor):
        _check.tensor(_NAME, "input", input)
    output_size, sampling_ratio = _sampling(_NAME, output_size, sampling_ratio, aligned)
    scale = _check.positive(_NAME, "spatial_scale", spatial_scale)
    boxes = as_rows(_NAME, boxes, input)
    one_level: tuple[list, list] = [scale], []
    sampling = *one_level, sampling_ratio, aligned, is_channels_last(input)
    return roi_align_op(input, None, None, None, None, boxes, output_size, *sampling, backend=backend)


def multiscale_roi_align(
    inputs: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    min_level: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """roi_align of each box on the level of a feature pyramid that fits its size, in one launch.

    With inputs of the levels min_level, min_level + 1, ... a box of width w and height h goes to level

        floor(canonical_level + log2(sqrt(w h) / canonical_scale) + 1e-6)

    or the nearest existing level: Lin et al., Feature pyramid networks; equals torchvision's MultiScaleRoIAlign.

    Args:
        inputs: 1 to 5 feature maps (N, C, H_l, W_l), fine to coarse, of one dtype, device, N and C.
        boxes, output_size, sampling_ratio, aligned, backend: as in `roi_align`.
        spatial_scales: cells per pixel of each level, e.g. [1/4, 1/8, 1/16, 1/32].
        canonical_scale, canonical_level: sqrt(w h), in pixels, of the least boxes of a level.
        min_level: the level of inputs[0]; None: -log2(spatial_scales[0]), rounded.

    Returns:
        (K, C, PH, PW) in the order of the boxes and the memory format of inputs[0]. Differentiable any number of times
        with respect to all inputs.

    Raises:
        As `roi_align`, with RuntimeError also for inputs that do not fit each other, ValueError also for other than one
        scale a level and a canonical_scale that is not a positive number.
    """
    op = "multiscale_roi_align"
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"fastseg.ops.{op}: inputs is {type(inputs).__name__}; allowed: a list of torch.Tensor")
    if not 1 <= len(inputs) <= MOST_LEVELS:
        raise ValueError(f"fastseg.ops.{op}: {len(inputs)} inputs; allowed: 1 to {MOST_LEVELS}")
    for place, level in enumerate(inputs):
        _check.tensor(op, f"inputs[{place}]", level)
    if not isinstance(spatial_scales, (list, tuple)) or len(spatial_scales) != len(inputs):
        raise ValueError(
            f"fastseg.ops.{op}: spatial_scales={spatial_scales!r}; allowed: a list of {len(inputs)}, one for each input"
        )
    output_size, sampling_ratio = _sampling(op, output_size, sampling_ratio, aligned)
    scales = [_check.positive(op, f"spatial_scales[{place}]", scale) for place, scale in enumerate(spatial_scales)]
    canonical_scale = _check.positive(op, "canonical_scale", canonical_scale)
    (canonical_level,) = _check.integers(op, "canonical_level", canonical_level, "int")
    if min_level is None:
        min_level = -round(math.log2(scales[0]))
    (min_level,) = _check.integers(op, "min_level", min_level, "int, or None")
    areas = level_areas(len(inputs), canonical_scale, canonical_level, min_level)
    boxes = as_rows(op, boxes, inputs[0])
    levels = [*inputs, *[None] * (MOST_LEVELS - len(inputs))]
    sampling = scales, areas, sampling_ratio, aligned, is_channels_last(inputs[0])
    return roi_align_op(*levels, boxes, output_size, *sampling, backend=backend)


def level_areas(levels: int, canonical_scale: float, canonical_level: int, min_level: int) -> list[float]:
    """The least areas of the boxes of all levels but the first: the rule of `multiscale_roi_align`, solved for w h."""
    steps = [min_level + level - canonical_level - 1e-6 for level in range(1, levels)]
    return [min(canonical_scale * 2.0 ** min(step, 500), 1e150) ** 2 for step in steps]
