"""sigmoid_focal_loss, drop-in for torchvision's: forward and backward of the mean."""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import Case
from benchmarks.inputs import logits


def make(shape, device, dtype, layout):
    input = logits(shape, device, dtype, layout)
    return input, (torch.rand_like(input) < 0.1).to(dtype)


def minimal_bytes(shape, dtype):
    """Logits and targets read once, gradient written once (it can be computed in the forward)."""
    batch, channels, height, width = shape
    return 3 * batch * channels * height * width * dtype.itemsize


def stock_sigmoid_focal_loss(input, target):
    """The expression of torchvision.ops.sigmoid_focal_loss with alpha 0.25 and gamma 2."""
    p = torch.sigmoid(input)
    loss = F.binary_cross_entropy_with_logits(input, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = 0.25 * target + 0.75 * (1 - target)
    return (alpha_t * loss * (1 - p_t) ** 2).mean()


def sigmoid_focal_loss(input, target):
    return fastseg.ops.sigmoid_focal_loss(input, target, reduction="mean")


def case(shape, targets=(), more_peers=None, **options):
    return Case(
        "sigmoid_focal_loss",
        shape,
        make,
        sigmoid_focal_loss,
        peers.stock(stock_sigmoid_focal_loss, ("contiguous",))
        | {"torchvision": peers.TORCHVISION_SIGMOID_FOCAL_LOSS}
        | (more_peers or {}),
        minimal_bytes,
        checks.differentiable_within_policy(stock_sigmoid_focal_loss),
        targets=targets,
        **options,
    )


CASES = [
    case((8, 1, 512, 1024)),
    case((8, 1, 512, 1024), peers.HALF_SPEED, peers.ours_in_float32(sigmoid_focal_loss), dtype=torch.bfloat16),
    case((2, 19, 512, 1024)),
    case((3, 1, 513, 511)),
]
