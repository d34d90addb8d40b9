"""cross_entropy with labels and with probabilities, focal_loss: forward and backward of the mean over the pixels."""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import checks, peers
from benchmarks.harness import MEMORY_FORMATS, Case, Target
from benchmarks.inputs import IGNORED, labels, logits


def make(shape, device, dtype, layout):
    batch, classes, *spatial = shape
    return logits(shape, device, dtype, layout), labels((batch, *spatial), classes, device)


def minimal_bytes(shape, dtype):
    """Logits and int64 labels read once, gradient written once (it can be computed in the forward)."""
    batch, classes, height, width = shape
    return batch * height * width * (2 * classes * dtype.itemsize + 8)


def make_probabilities(shape, device, dtype, layout):
    """Logits, and the softmax of other logits as target."""
    target = logits(shape, device, torch.float32, layout).softmax(1).to(dtype)
    return logits(shape, device, dtype, layout), target.contiguous(memory_format=MEMORY_FORMATS[layout])


def minimal_bytes_of_probabilities(shape, dtype):
    """Logits and targets read once, gradient written once."""
    batch, classes, height, width = shape
    return batch * height * width * 3 * classes * dtype.itemsize


def stock_cross_entropy(input, target):
    return F.cross_entropy(input, target, ignore_index=IGNORED)


def cross_entropy(input, target):
    return fastseg.ops.cross_entropy(input, target, ignore_index=IGNORED)


def cross_entropy_of_probabilities(input, target):
    return fastseg.ops.cross_entropy(input, target)


def stock_focal_loss(input, target):
    """-(1 - p_t)^2 log p_t, averaged over the valid pixels."""
    log_p = -F.cross_entropy(input, target, ignore_index=IGNORED, reduction="none")
    loss = -((1 - log_p.exp()) ** 2) * log_p
    return loss.sum() / (target != IGNORED).sum()


def focal_loss(input, target):
    return fastseg.ops.focal_loss(input, target, gamma=2.0, ignore_index=IGNORED)


def cross_entropy_case(shape, targets=(), more_peers=None, **options):
    return Case(
        "cross_entropy",
        shape,
        make,
        cross_entropy,
        peers.stock(stock_cross_entropy) | {"liger": peers.LIGER_CROSS_ENTROPY} | (more_peers or {}),
        minimal_bytes,
        checks.differentiable_within_policy(stock_cross_entropy),
        targets=targets,
        **options,
    )


def probabilities_case(shape, **options):
    return Case(
        "cross_entropy",
        shape,
        make_probabilities,
        cross_entropy_of_probabilities,
        peers.stock(F.cross_entropy),
        minimal_bytes_of_probabilities,
        checks.differentiable_within_policy(F.cross_entropy),
        name="probabilities",
        **options,
    )


def focal_loss_case(shape, targets=(), more_peers=None, **options):
    return Case(
        "focal_loss",
        shape,
        make,
        focal_loss,
        peers.stock(stock_focal_loss) | (more_peers or {}),
        minimal_bytes,
        checks.differentiable_within_policy(stock_focal_loss),
        targets=targets,
        **options,
    )


FLOAT32 = peers.ours_in_float32(cross_entropy)
GPU_BANDWIDTH = Target("bandwidth", 0.85, device="cuda", allocator="default")

CASES = [
    cross_entropy_case(
        (2, 19, 512, 1024),
        (
            Target("speedup", 2.5),
            Target("speedup", 4, "eager"),
            Target("speedup", 3, "eager", "default"),
        ),
    ),
    cross_entropy_case(
        (2, 19, 512, 1024),
        # The target for channels_last logits is relative to the best stock on channels_last logits.
        (Target("speedup", 1.8, "compile channels_last"),),
        layout="channels_last",
    ),
    cross_entropy_case((2, 150, 512, 512), (Target("speedup", 3.3),)),
    cross_entropy_case((16, 19, 512, 1024), (GPU_BANDWIDTH,), devices=("cuda",)),
    cross_entropy_case((2, 19, 512, 1024), peers.HALF_SPEED, FLOAT32, dtype=torch.bfloat16),
    cross_entropy_case(
        (2, 19, 512, 1024),
        peers.HALF_SPEED,
        FLOAT32,
        dtype=torch.bfloat16,
        layout="channels_last",
    ),
    cross_entropy_case((2, 150, 512, 512), peers.HALF_SPEED, FLOAT32, dtype=torch.bfloat16),
    cross_entropy_case((4, 2, 512, 512), peers.HALF_SPEED, FLOAT32, dtype=torch.bfloat16),
    cross_entropy_case((16, 2, 512, 512), peers.HALF_SPEED, FLOAT32, dtype=torch.bfloat16),
    cross_entropy_case((16, 19, 512, 1024), dtype=torch.bfloat16, devices=("cuda",)),
    cross_entropy_case((2, 21, 513, 513)),
    cross_entropy_case((4, 2, 512, 512)),
    cross_entropy_case((1, 1000, 256, 256)),
    cross_entropy_case((1, 19, 64, 128)),
    probabilities_case((2, 19, 512, 1024)),
    probabilities_case((2, 19, 512, 1024), layout="channels_last"),
    probabilities_case((2, 19, 512, 1024), dtype=torch.bfloat16),
    probabilities_case((2, 150, 256, 256)),
    probabilities_case((2, 19, 64, 64)),
    focal_loss_case((2, 19, 512, 1024)),
    focal_loss_case((2, 150, 512, 512)),
    focal_loss_case(
        (2, 19, 512, 1024),
        peers.HALF_SPEED,
        peers.ours_in_float32(focal_loss),
        dtype=torch.bfloat16,
    ),
]
