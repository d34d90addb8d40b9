"""Sigmoid focal loss in Triton, elementwise: formulas in README.md."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastseg._triton import AotCase, on_device_of
from fastseg.kernels._sigmoid import sigmoid_parts


class Config(NamedTuple):
    block: int
    warps: int


CONFIGS = {"any": Config(1024, 4)}  # 8 elements per thread: two accesses of 16 bytes in fp32, one in half types


@triton.jit
def focal_parts(z, t, alpha, ALPHA: tl.constexpr):
    """(p, q, 1 - p_t, alpha_t, cross-entropy) of logits z and targets t."""
    p, q, hinge, log_term = sigmoid_parts(z)
    weight = alpha * t + (1.0 - alpha) * (1.0 - t) if ALPHA else tl.full(t.shape, 1.0, tl.float32)
    return p, q, p * (1.0 - t) + q * t, weight, ((1.0 - t) * z + hinge) + log_term


@triton.jit
def modulation(missed, gamma, SQUARED: tl.constexpr):
    """missed^gamma, SQUARED if gamma is 2."""
    if SQUARED:
        return missed * missed
    else:
        return tl.exp2(gamma * tl.log2(tl.where(missed < 1e-38, 1e-38, missed)))  # whose power 0 is 1


@triton.jit
def sigmoid_focal_loss_kernel(
    inputs, targets,  # [n]
    loss,  # [n], or [programs] fp32 if SUMMED
    n, alpha, gamma, ALPHA: tl.constexpr, SQUARED: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    z = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
    _, _, missed, weight, cross_entropy = focal_parts(z, t, alpha, ALPHA)
    value = weight * modulation(missed, gamma, SQUARED) * cross_entropy
    if SUMMED:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0), 0))
    else:
        tl.store(loss + place, value.to(loss.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid_focal_loss_backward_kernel(
    inputs, targets,  # [n]
    grad_loss,  # [n] of stride grad_stride, or [] with grad_stride 0
    grad_inputs,  # [n]
    n, grad_stride, alpha, gamma, ALPHA: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha_t (missed^gamma (p - t) + gamma missed^(gamma - 1) p q (1 - 2 t) cross_entropy), times grad_loss."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    z = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_loss + place * grad_stride, mask=inside, other=0.0).to(tl.float32)
    p, q, missed, weight, cross_entropy = focal_parts(z, t, alpha, ALPHA)
    derivative = p * (1.0 - t) - q * t  # p - t, without cancellation
    spread = gamma * p * q * (1.0 - 2.0 * t) * cross_entropy
    if SQUARED:
        derivative = missed * (missed * derivative + spread)
    else:
        ratio = tl.where(missed == 0.0, 0.0, spread / missed)  # 0 / 0 is replaced by its limit
        derivative = modulation(missed, gamma, SQUARED) * (derivative + ratio)
    tl.store(grad_inputs + place, (grad * weight * derivative).to(grad_inputs.dtype.element_ty), mask=inside)


def _launch(kernel, tensors, strides, alpha, gamma, **constexprs) -> None:
    """Of n elements each: tensors[0] has that many."""
    config, n = CONFIGS["any"], tensors[0].numel()
    if n:
        with on_device_of(tensors[0]):
            kernel[(triton.cdiv(n, config.block),)](
                *tensors, n, *strides, alpha, gamma, ALPHA=alpha >= 0, SQUARED=gamma == 2, **constexprs,
                BLOCK=config.block, num_warps=config.warps,
            )  # fmt: skip


def forward(inputs, targets, alpha, gamma, summed, loss):
    """loss: [n], or the sum [] in fp32 if `summed`."""
    parts = loss.new_empty((triton.cdiv(inputs.numel(), CONFIGS["any"].block),)) if summed else loss
    _launch(sigmoid_focal_loss_kernel, (inputs, targets, parts), (), alpha, gamma, SUMMED=summed)
    if summed:
        torch.sum(parts, 0, out=loss)


def backward(inputs, targets, grad_loss, alpha, gamma, grad_inputs):
    """grad_loss: [] or [n] of any stride; grad_inputs: [n]."""
    stride = grad_loss.stride(0) if grad_loss.dim() else 0
    _launch(sigmoid_focal_loss_backward_kernel, (inputs, targets, grad_loss, grad_inputs), (stride,), alpha, gamma)


# --- ahead-of-time cases ---


def aot_cases() -> list[AotCase]:
    cases = []
    forward, backward = sigmoid_focal_loss_kernel, sigmoid_focal_loss_backward_kernel
    for dtype, squared in (("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)):
        own, wide = f"*{dtype}", dict(load_bits=128, store_bits=128)
        for name, kernel, outputs, options, limits in (
            ("forward", forward, dict(loss=own), dict(SUMMED=False), wide),
            ("sum", forward, dict(loss="*fp32"), dict(SUMMED=True), dict(load_bits=128)),
            ("backward", backward, dict(grad_loss="*fp32", grad_inputs=own), dict(grad_stride=1), wide),
        ):
            pointers = dict(inputs=own, targets=own, **outputs)
            constexprs = dict(ALPHA=True, SQUARED=squared, BLOCK=CONFIGS["any"].block, **options)
            cases.append(AotCase(
                f"{name}-{dtype}{'-squared' if squared else ''}", kernel,
                {**pointers, "n": "i32", "alpha": "fp32", "gamma": "fp32"}, constexprs,
                num_warps=CONFIGS["any"].warps, divisible=(*pointers, "n"), max_registers=96, **limits,
            ))  # fmt: skip
    return cases
