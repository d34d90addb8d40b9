"""What cross_entropy does alike for labels and for probabilities.

Checks, [N, C, P] views for C++ and Triton, gradients in the layout of what they belong to.
"""

import torch
from torch import Tensor

from fastseg import _check, _library
from fastseg._first_op import FLOATING, in_functional_transform
from fastseg._triton import lazy
from fastseg.kernels.cross_entropy.reference import NONE

_scale_on_gpu = lazy("cross_entropy.triton", "scale_in_place")


def check_common(op, input, weight, weight_dtypes, pixel_weight, label_smoothing):
    """The arguments that labels and probabilities share."""
    if input.dim() < 2 or input.shape[1] == 0:
        raise RuntimeError(
            f"fastseg.ops.{op}: input has shape {tuple(input.shape)}; allowed: (C,) or (N, C, ...) with C > 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"fastseg.ops.{op}: label_smoothing={label_smoothing!r}; allowed: 0.0 to 1.0")
    if weight is not None:
        name = weight_name(op)
        _check.tensor(op, name, weight)
        _check.dtype(op, name, weight, weight_dtypes)
        _check.same_device(op, name, weight, "input", input)
        _check.shape(op, name, weight, (input.shape[1],), "one per class")
    if pixel_weight is not None:
        _check.tensor(op, "pixel_weight", pixel_weight)
        _check.dtype(op, "pixel_weight", pixel_weight, FLOATING)
        _check.same_device(op, "pixel_weight", pixel_weight, "input", input)
        check_spatial(op, "pixel_weight", pixel_weight, input)
        if pixel_weight.requires_grad:
            raise RuntimeError(f"fastseg.ops.{op}: pixel_weight requires grad; allowed: a constant")


def weight_name(op: str) -> str:
    """What the public function calls its class weights."""
    return "alpha" if op == "focal_loss" else "weight"


def check_spatial(op, name, value, input):
    """`value` has one element per pixel."""
    if value.dim() > 0 and value.shape[0] != input.shape[0]:
        raise ValueError(
            f"fastseg.ops.{op}: {name} has batch size {value.shape[0]}; "
            f"allowed: {input.shape[0]}, the batch size of input"
        )
    _check.shape(op, name, value, (input.shape[0], *input.shape[2:]), "input without its class dimension")


def classes_innermost(input: Tensor) -> bool:
    """channels_last and its relatives in any number of dimensions."""
    return input.dim() > 2 and input.shape[1] > 1 and input.stride(1) == 1 and not input.is_contiguous()


def empty_gradient(input: Tensor) -> Tensor:
    """Dense, in the memory format of `input`."""
    if classes_innermost(input):
        return torch.empty_like(input.movedim(1, -1), memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def in_layout_of(input: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` as `empty_gradient(input)` would lie."""
    if classes_innermost(input):
        return gradient.movedim(1, -1).contiguous().movedim(-1, 1)
    return gradient.contiguous()


def one_image(input: Tensor) -> bool:
    """Whether all N * P pixels lie as those of a single image: classes are side by side, or images have one pixel."""
    return input.dim() == 2 or classes_innermost(input) or (input.numel() > 0 and input[0, 0].numel() == 1)


def pixels(tensor: Tensor, as_one_image: bool) -> Tensor:
    """A [N, C, P] or [1, C, N * P] view with unit class or pixel stride; a copy where the strides allow none."""
    if tensor.numel() == 0:
        return tensor.new_empty((1, tensor.shape[1], 0))
    view = tensor.movedim(1, 0).flatten(1).unsqueeze(0) if as_one_image else tensor.flatten(2)
    return view if 1 in view.stride()[1:] else view.contiguous()


def plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous, in the accumulator's dtype."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """gradient * grad_loss, in place where nobody can see the saved gradient again."""
    if type(gradient) is not Tensor or in_functional_transform():  # being traced, or a batch of them
        return gradient * grad_loss
    again = torch._C._autograd._get_current_graph_task_keep_graph()
    if gradient.device.type == "cpu" and grad_loss.item() == 1:
        return gradient.clone() if again else gradient
    if again:
        return gradient * grad_loss
    if gradient.device.type == "cuda" and _library.missing("triton") is None:
        _scale_on_gpu(gradient, grad_loss)
        return gradient
    return gradient.mul_(grad_loss)


def gradient_in_forward(reduction: int, *inputs: Tensor) -> bool:
    """Whether to compute the gradients with the loss: every input is then read once instead of twice.

    Not in fp16, where the gradient must be multiplied by the loss scale before it is rounded, and not in a compiled
    graph, which cannot know that grad_output is 1.
    """
    wanted = torch.is_grad_enabled() and any(input.requires_grad for input in inputs)
    fits = reduction != NONE and all(input.dtype != torch.float16 for input in inputs)
    return wanted and fits and not torch.compiler.is_compiling()
