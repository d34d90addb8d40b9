"""Sigmoid focal loss, elementwise (Lin et al. 2017); drop-in for torchvision.ops.sigmoid_focal_loss.

    p = sigmoid(z),  p_t = p t + (1 - p)(1 - t),  alpha_t = alpha t + (1 - alpha)(1 - t)
    loss = alpha_t (1 - p_t)^gamma BCE(z, t)

One read of logits and targets forward, one backward; the probabilities are computed again rather than stored.
The ops take flat tensors; the public function flattens in the order of the memory.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._op import FLOATING, FLOATING_GPU, Backend, Op, native
from fastseg._triton import lazy
from fastseg.kernels.sigmoid_focal_loss import reference
from fastseg.ops._binary import in_memory_order, like_memory_order
from fastseg.ops._dice import loss_dtype

_forward_native = native(
    "_sigmoid_focal_loss_forward(Tensor inputs, Tensor targets, float alpha, float gamma, bool summed, bool wide)"
    " -> Tensor"
)
_backward_native = native(
    "_sigmoid_focal_loss_backward(Tensor inputs, Tensor targets, Tensor grad_loss, float alpha, float gamma) -> Tensor"
)


def check(inputs, targets, alpha, gamma, summed=False, wide=False):
    name = "sigmoid_focal_loss"
    _check.dtype(name, "inputs", inputs, FLOATING)
    _check.dtype(name, "targets", targets, FLOATING)
    _check.shape(name, "inputs", inputs, ("n",))
    _check.shape(name, "targets", targets, inputs.shape)
    _check.same_device(name, "targets", targets, "inputs", inputs)


def fake(inputs, targets, alpha, gamma, summed, wide):
    accumulator = torch.promote_types(inputs.dtype, torch.float32)
    return inputs.new_empty(() if summed else inputs.shape, dtype=accumulator if summed or wide else inputs.dtype)


def save(ctx, inputs, output):
    logits, targets, ctx.alpha, ctx.gamma, *_ = inputs
    ctx.save_for_backward(logits, targets)


def backward(ctx, grad_loss):
    return sigmoid_focal_loss_backward(*ctx.saved_tensors, grad_loss, ctx.alpha, ctx.gamma), *[None] * 5


def check_backward(inputs, targets, grad_loss, alpha, gamma):
    check(inputs, targets, alpha, gamma)
    _check.dtype("sigmoid_focal_loss_backward", "grad_loss", grad_loss, FLOATING)
    if grad_loss.dim():
        _check.shape("sigmoid_focal_loss_backward", "grad_loss", grad_loss, inputs.shape)


elementwise = Op(
    "sigmoid_focal_loss",
    "(Tensor inputs, Tensor targets, float alpha, float gamma, bool summed, bool wide) -> Tensor",
    check=check,
    fake=fake,
    save=save,
    backward=backward,
    backends=[
        Backend("cpu", _forward_native, dtypes=FLOATING),
        Backend("triton", lazy("sigmoid_focal_loss.triton", "forward"), dtypes=FLOATING_GPU),
        Backend("reference", reference.sigmoid_focal_loss),
    ],
)
sigmoid_focal_loss_backward = Op(
    "sigmoid_focal_loss_backward",
    "(Tensor inputs, Tensor targets, Tensor grad_loss, float alpha, float gamma) -> Tensor",
    check=check_backward,
    fake=lambda inputs, *others: inputs.new_empty(inputs.shape),
    differentiable=True,
    backends=[
        Backend("cpu", _backward_native, dtypes=FLOATING),
        Backend("triton", lazy("sigmoid_focal_loss.triton", "backward"), dtypes=FLOATING_GPU),
        Backend("reference", reference.sigmoid_focal_loss_backward),
    ],
)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """Focal loss of sigmoid(inputs); drop-in for torchvision.ops.sigmoid_focal_loss.

        alpha_t (1 - p_t)^gamma BCE(inputs, targets),  p_t = p t + (1 - p)(1 - t),  alpha_t likewise from alpha

    Args:
        inputs: logits of any shape, in fp32, fp16, bf16 or fp64; channels_last is kept.
        targets: of the same shape, floating: 0 and 1, or anything between.
        alpha: weight of the positives in [0, 1], the negatives get 1 - alpha; a negative number switches it off.
        gamma: exponent of the modulating factor.
        reduction: "none", "mean" (0 for no elements, as torchvision) or "sum".
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        The loss, shaped like `inputs`, or a scalar; its dtype is that of `inputs` and `targets` together, and
        fp32 for half types under autocast. Twice differentiable in `inputs`; if `targets` requires grad,
        plain PyTorch runs.

    Raises:
        ValueError: shapes that differ, an unknown reduction, alpha above 1.
        RuntimeError, TypeError: dtypes, devices or types not listed above.
    """
    name = "sigmoid_focal_loss"
    _check.tensor(name, "inputs", inputs)
    _check.tensor(name, "targets", targets)
    _check.dtype(name, "inputs", inputs, FLOATING)
    _check.dtype(name, "targets", targets, FLOATING)
    _check.same_device(name, "targets", targets, "inputs", inputs)
    _check.one_of(name, "reduction", reduction, ("none", "mean", "sum"))
    if targets.shape != inputs.shape:
        sizes = f"{tuple(targets.shape)}; allowed: {tuple(inputs.shape)}, the shape of inputs"
        raise ValueError(f"fastseg.ops.{name}: targets has shape {sizes}")
    if not alpha <= 1:
        raise ValueError(f"fastseg.ops.{name}: alpha={alpha!r}; allowed: 0 to 1, or a negative number for none")
    dtype = torch.promote_types(loss_dtype(inputs), targets.dtype)
    if dtype == torch.float64:
        inputs = inputs.double()
    if targets.requires_grad:
        loss = reference.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction != "none", True)
    else:
        flat = in_memory_order(inputs, inputs), in_memory_order(targets, inputs)
        wide = dtype != inputs.dtype
        loss = elementwise(*flat, float(alpha), float(gamma), reduction != "none", wide, backend=backend)
        if reduction == "none":
            loss = like_memory_order(loss, inputs)
    if reduction == "mean":
        loss = loss / max(1, inputs.numel())
    return loss.to(dtype)
