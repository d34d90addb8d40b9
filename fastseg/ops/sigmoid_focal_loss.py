"""Sigmoid focal loss, elementwise (Lin et al. 2017); drop-in for torchvision.ops.sigmoid_focal_loss.

    p = sigmoid(z),  p_t = p t + (1 - p)(1 - t),  alpha_t = alpha t + (1 - alpha)(1 - t)
    loss = alpha_t (1 - p_t)^gamma BCE(z, t)

Forward and backward each read logits and targets once; the backward computes the probabilities again.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, accumulator, loss_dtype
from fastseg._layout import in_memory_order, like_memory_order
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg._reduction import MEAN, NONE, reduction_number
from fastseg.kernels.sigmoid_focal_loss import reference

_NAME = "sigmoid_focal_loss"


# The ops take flat tensors (n,); the public function flattens in memory order.


def check(inputs, targets, dtype):
    check_tensors(inputs, targets)
    _check.one_of(_NAME, "dtype", dtype, FLOATING)


def check_tensors(inputs, targets):
    _check.argument(_NAME, "inputs", inputs, FLOATING, ("n",))
    _check.argument(_NAME, "targets", targets, FLOATING, inputs.shape, like=("inputs", inputs))


def outputs(inputs, summed, dtype):
    return inputs.new_empty(() if summed else inputs.shape, dtype=accumulator(inputs.dtype) if summed else dtype)


def backward(inputs, targets, grad_loss, alpha, gamma, backend):
    return {"inputs": sigmoid_focal_loss_backward(inputs, targets, grad_loss, alpha, gamma, backend=backend)}


sigmoid_focal_loss_op = Op(
    "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha, float gamma, bool summed, ScalarType dtype)"
    " -> Tensor loss",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    contiguous=("inputs", "targets"),
    backends=rows(reference.sigmoid_focal_loss, triton="sigmoid_focal_loss.triton.forward"),
)


def check_backward(inputs, targets, grad_loss):
    check_tensors(inputs, targets)
    _check.dtype("sigmoid_focal_loss_backward", "grad_loss", grad_loss, FLOATING)
    if grad_loss.dim():
        _check.shape("sigmoid_focal_loss_backward", "grad_loss", grad_loss, inputs.shape)


sigmoid_focal_loss_backward = Op(
    "sigmoid_focal_loss_backward(Tensor inputs, Tensor targets, Tensor grad_loss, float alpha, float gamma)"
    " -> Tensor grad_inputs",
    check=check_backward,
    outputs=lambda inputs: torch.empty_like(inputs, memory_format=torch.contiguous_format),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=("inputs", "targets"),
    backends=rows(reference.sigmoid_focal_loss_backward, triton="sigmoid_focal_loss.triton.backward"),
)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """Focal loss of sigmoid(inputs); drop-in for torchvision.ops.sigmoid_focal_loss.

        alpha_t (1 - p_t)^gamma BCE(inputs, targets),  p_t = p t + (1 - p)(1 - t),  alpha_t likewise from alpha

    Args:
        inputs: logits of any shape, in fp32, fp16, bf16 or fp64; channels_last is kept.
        targets: of the same shape, floating: 0 and 1, or anything between.
        alpha: weight of the positives in [0, 1], the negatives get 1 - alpha; a negative number means no weights.
        gamma: exponent of the modulating factor.
        reduction: "none", "mean" (0 for no elements, as in torchvision) or "sum".
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        The loss, shaped like `inputs`, or a scalar; its dtype is that of `inputs` and `targets` together, and
        fp32 for half types under autocast. Twice differentiable in `inputs`; if `targets` requires grad,
        plain PyTorch runs. The backward needs both unchanged: after an in-place change PyTorch raises.

    Raises:
        ValueError: shapes that differ, an unknown reduction, alpha above 1.
        RuntimeError, TypeError: dtypes, devices or types not listed above.
    """
    _check.tensors(_NAME, inputs=inputs, targets=targets)
    reduced = reduction_number(_NAME, reduction)
    if targets.shape != inputs.shape:
        sizes = f"{tuple(targets.shape)}; allowed: {tuple(inputs.shape)}, the shape of inputs"
        raise ValueError(f"fastseg.ops.{_NAME}: targets has shape {sizes}")
    _check.argument(_NAME, "inputs", inputs, FLOATING, inputs.shape)
    _check.argument(_NAME, "targets", targets, FLOATING, inputs.shape, like=("inputs", inputs))
    alpha, gamma = _check.numbers(_NAME, alpha=alpha, gamma=gamma)
    if not alpha <= 1:
        raise ValueError(f"fastseg.ops.{_NAME}: alpha={alpha!r}; allowed: 0 to 1, or a negative number for none")
    dtype = torch.promote_types(loss_dtype(inputs), targets.dtype)
    if dtype == torch.float64:
        inputs = inputs.double()
    summed = reduced != NONE
    if targets.requires_grad:
        loss = reference.sigmoid_focal_loss(inputs, targets, alpha, gamma, summed, accumulator(inputs.dtype))
    else:
        flat = in_memory_order(inputs, targets)
        loss = sigmoid_focal_loss_op(*flat, alpha, gamma, summed=summed, dtype=dtype, backend=backend)
        if not summed:
            return like_memory_order(loss, inputs)
    if reduced == MEAN:
        loss = loss / max(1, inputs.numel())
    return loss.to(dtype)
