"""What cross_entropy does alike for labels and for probabilities."""

from fastseg import _check
from fastseg._dtypes import FLOATING


def check_common(op, input, weight, pixel_weight, label_smoothing):
    """The arguments that labels and probabilities share: input [N, C, ...]."""
    if input.dim() < 2 or input.shape[1] == 0:
        raise RuntimeError(
            f"fastseg.ops.{op}: input has shape {tuple(input.shape)}; allowed: (C,) or (N, C, ...) with C > 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"fastseg.ops.{op}: label_smoothing={label_smoothing!r}; allowed: 0.0 to 1.0")
    if weight is not None:
        name = "alpha" if op == "focal_loss" else "weight"
        _check.tensor(op, name, weight)
        _check.dtype(op, name, weight, FLOATING)
        _check.same_device(op, name, weight, "input", input)
        _check.shape(op, name, weight, (input.shape[1],), "one per class")
    if pixel_weight is not None:
        _check.tensor(op, "pixel_weight", pixel_weight)
        _check.dtype(op, "pixel_weight", pixel_weight, FLOATING)
        _check.same_device(op, "pixel_weight", pixel_weight, "input", input)
        check_spatial(op, "pixel_weight", pixel_weight, input)
        if pixel_weight.requires_grad:
            raise RuntimeError(f"fastseg.ops.{op}: pixel_weight requires grad; allowed: a constant")


def check_spatial(op, name, value, input):
    """`value` has one element per pixel of input [N, C, ...]."""
    given, shape = value.shape, input.shape
    if given[:1] == shape[:1] and given[1:] == shape[2:]:
        return
    if value.dim() > 0 and given[0] != shape[0]:
        raise ValueError(
            f"fastseg.ops.{op}: {name} has batch size {given[0]}; allowed: {shape[0]}, the batch size of input"
        )
    _check.shape(op, name, value, (shape[0], *shape[2:]), "input without its class dimension")
