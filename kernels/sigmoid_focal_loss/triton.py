"""Sigmoid focal loss in Triton, elementwise: formulas in README.md."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastseg.kernels._binary import sigmoid_parts

from fastseg._triton import AotCase, on_device_of


class Config(NamedTuple):
    block: int
    warps: int


CONFIGS = {"any": Config(1024, 4)}  # 8 elements per thread: two accesses of 16 bytes in fp32, one in half types


@triton.jit
def focal_parts(z, t, alpha, ALPHA: tl.constexpr):
    """(p, q, 1 - p_t, alpha_t, cross-entropy) of logits z and targets t."""
    p, q, below, rest = sigmoid_parts(z)
    weight = alpha * t + (1.0 - alpha) * (1.0 - t) if ALPHA else tl.full(t.shape, 1.0, tl.float32)
    return p, q, p * (1.0 - t) + q * t, weight, ((1.0 - t) * z + below) + rest


@triton.jit
def modulation(missed, gamma, GAMMA: tl.constexpr):
    """missed^gamma; GAMMA is 0 or 2 for these exponents, None for any other."""
    if GAMMA == 0:
        return tl.full(missed.shape, 1.0, tl.float32)
    elif GAMMA == 2:
        return missed * missed
    else:
        return tl.exp2(gamma * tl.log2(missed))


@triton.jit
def sigmoid_focal_loss_kernel(
    inputs, targets,  # [n]
    loss,  # [n], or [programs] fp32 if SUMMED
    n, alpha, gamma, ALPHA: tl.constexpr, GAMMA: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    z = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
    _, _, missed, weight, cross_entropy = focal_parts(z, t, alpha, ALPHA)
    value = weight * modulation(missed, gamma, GAMMA) * cross_entropy
    if SUMMED:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(inside, value, 0.0), 0))
    else:
        tl.store(loss + place, value.to(loss.dtype.element_ty), mask=inside)


@triton.jit
def sigmoid_focal_loss_backward_kernel(
    inputs, targets,  # [n]
    grad_loss,  # [n] of stride grad_stride, or [] with grad_stride 0
    grad_inputs,  # [n]
    n, grad_stride, alpha, gamma, ALPHA: tl.constexpr, GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """alpha_t (missed^gamma (p - t) + gamma missed^(gamma - 1) p q (1 - 2 t) cross_entropy), times grad_loss."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    z = tl.load(inputs + place, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_loss + place * grad_stride, mask=inside, other=0.0).to(tl.float32)
    p, q, missed, weight, cross_entropy = focal_parts(z, t, alpha, ALPHA)
    derivative = p * (1.0 - t) - q * t  # p - t, without cancellation
    if GAMMA != 0:
        spread = gamma * p * q * (1.0 - 2.0 * t) * cross_entropy
        if GAMMA == 2:
            derivative = missed * (missed * derivative + spread)
        else:
            ratio = tl.where(missed == 0.0, 0.0, spread / missed)  # 0 / 0 stands for its limit
            derivative = modulation(missed, gamma, GAMMA) * (derivative + ratio)
    tl.store(grad_inputs + place, (grad * weight * derivative).to(grad_inputs.dtype.element_ty), mask=inside)


# --- launchers ---


def _constexprs(alpha: float, gamma: float) -> dict:
    return dict(ALPHA=alpha >= 0, GAMMA=int(gamma) if gamma in (0, 2) else None)


def forward(inputs, targets, alpha, gamma, summed, loss):
    """loss: [n], or the sum [] in fp32 if `summed`."""
    config, n = CONFIGS["any"], inputs.numel()
    programs = triton.cdiv(n, config.block)
    parts = loss.new_empty((programs,)) if summed else loss
    if programs:
        with on_device_of(inputs):
            sigmoid_focal_loss_kernel[(programs,)](
                inputs, targets, parts, n, alpha, gamma, **_constexprs(alpha, gamma), SUMMED=summed, BLOCK=config.block,
                num_warps=config.warps,
            )  # fmt: skip
    if summed:
        torch.sum(parts, 0, out=loss)


def backward(inputs, targets, grad_loss, alpha, gamma, grad_inputs):
    """grad_loss: [] or [n] of any stride; grad_inputs: [n]."""
    config, n = CONFIGS["any"], inputs.numel()
    if n:
        with on_device_of(inputs):
            sigmoid_focal_loss_backward_kernel[(triton.cdiv(n, config.block),)](
                inputs, targets, grad_loss, grad_inputs, n, grad_loss.stride(0) if grad_loss.dim() else 0, alpha, gamma,
                **_constexprs(alpha, gamma), BLOCK=config.block, num_warps=config.warps,
            )  # fmt: skip


# --- ahead-of-time cases ---


def aot_cases() -> list[AotCase]:
    cases = []
    config = CONFIGS["any"]
    for dtype in ("fp32", "bf16"):
        pointers = dict(inputs=f"*{dtype}", targets=f"*{dtype}")
        scalars = dict(n="i32", alpha="fp32", gamma="fp32")
        wide = dict(num_warps=config.warps, load_bits=128, max_registers=96)
        for gamma in (2.0, 0.5):
            constexprs = dict(_constexprs(0.25, gamma), BLOCK=config.block)
            cases += [
                AotCase(
                    f"forward-{dtype}-gamma{gamma}", sigmoid_focal_loss_kernel,
                    {**pointers, "loss": f"*{dtype}", **scalars},
                    dict(constexprs, SUMMED=False), divisible=(*pointers, "loss", "n"), store_bits=128, **wide,
                ),
                AotCase(
                    f"sum-{dtype}-gamma{gamma}", sigmoid_focal_loss_kernel, {**pointers, "loss": "*fp32", **scalars},
                    dict(constexprs, SUMMED=True), divisible=(*pointers, "loss", "n"), **wide,
                ),
                AotCase(
                    f"backward-{dtype}-gamma{gamma}", sigmoid_focal_loss_backward_kernel,
                    {**pointers, "grad_loss": "*fp32", "grad_inputs": f"*{dtype}", **scalars},
                    dict(constexprs, grad_stride=1), divisible=(*pointers, "grad_loss", "grad_inputs", "n"),
                    store_bits=128, **wide,
                ),
            ]  # fmt: skip
    return cases
