"""Shared by the Triton kernels of the sigmoid losses: a sigmoid and its cross-entropy without cancellation."""

import triton
import triton.language as tl


@triton.jit
def sigmoid_parts(z):
    """p = sigmoid(z), q = 1 - p, and hinge = max(-z, 0), log_term = log(1 + e^-|z|), whose sum is -log p."""
    small = tl.exp2(-tl.abs(z) * 1.4426950408889634)
    one = 1.0 + small
    larger = 1.0 / one
    smaller = small * larger
    log1p = tl.where(one == 1.0, small, tl.log(one) * small / (one - 1.0))
    positive = z >= 0.0
    return tl.where(positive, larger, smaller), tl.where(positive, smaller, larger), tl.maximum(-z, 0.0), log1p
