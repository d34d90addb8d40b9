"""Shared by the ops of the upsampled losses: schemas, checks and layouts.

Shapes: input (N, C, h, w), target and pixel_weight (N, H, W), weight (C,).
"""

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, FLOATING_GPU, LABELS, accumulator

INPUTS = "Tensor input, Tensor target, Tensor? weight, Tensor? pixel_weight"
SAMPLING = "float[]? scale_factors, bool align_corners, int ignore_index, float label_smoothing"
CONTIGUOUS = ("target", "weight", "pixel_weight")


def check(input, target, weight, pixel_weight, label_smoothing):
    name = "upsample_cross_entropy"
    like = ("input", input)
    _check.argument(name, "input", input, FLOATING, ("N", "C", "h", "w"))
    _check.argument(name, "target", target, LABELS, (input.shape[0], "H", "W"), like=like)
    if 0 in input.shape[1:] or 0 in target.shape[1:]:
        reject_empty(name, input, target)
    for argument, value, shape in (("weight", weight, input.shape[1:2]), ("pixel_weight", pixel_weight, target.shape)):
        if value is not None:
            _check.argument(name, argument, value, (accumulator(input.dtype),), shape, like=like)
    _check.in_range(name, "label_smoothing", label_smoothing, 0.0, 1.0)


def reject_empty(name, input, target):
    raise RuntimeError(
        f"fastseg.ops.{name}: input has shape {tuple(input.shape)} and target {tuple(target.shape)}; "
        "allowed: no size but N may be 0"
    )


def backends(launcher, reference):
    """The table of backends. Only gradcheck uses fp64: the reference runs it."""
    return rows(reference, cpu=FLOATING_GPU, triton=f"upsample_cross_entropy.triton.{launcher}")
