"""Checks of cross_entropy for both kinds of targets, labels and probabilities."""

from fastseg import _check
from fastseg._dtypes import FLOATING


def check_common(op, input, weight, pixel_weight, label_smoothing):
    """Checks the arguments that both kinds of targets share: input [N, C, ...]."""
    if input.dim() < 2 or input.shape[1] == 0:
        raise RuntimeError(
            f"fastseg.ops.{op}: input has shape {tuple(input.shape)}; allowed: (C,) or (N, C, ...) with C > 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"fastseg.ops.{op}: label_smoothing={label_smoothing!r}; allowed: 0.0 to 1.0")
    if weight is not None:
        name = "alpha" if op == "focal_loss" else "weight"
        _check.argument(op, name, weight, FLOATING, (input.shape[1],), "one per class", like=("input", input))
    if pixel_weight is not None:
        _check.tensors(op, pixel_weight=pixel_weight)
        check_spatial(op, "pixel_weight", pixel_weight, input)
        _check.argument(op, "pixel_weight", pixel_weight, FLOATING, pixel_weight.shape, like=("input", input))
        _check.constant(op, "pixel_weight", pixel_weight)


def check_spatial(op, name, value, input):
    """`value` must have one element per pixel of input [N, C, ...]."""
    given, shape = value.shape, input.shape
    if given[:1] == shape[:1] and given[1:] == shape[2:]:
        return
    if value.dim() > 0 and given[0] != shape[0]:
        raise ValueError(
            f"fastseg.ops.{op}: {name} has batch size {given[0]}; allowed: {shape[0]}, the batch size of input"
        )
    _check.shape(op, name, value, (shape[0], *shape[2:]), "input without its class dimension")
