"""soft_nms of the boxes of benchmarks/ops/nms.py. The shape of a case is (N, 4)."""

import torch

import fastseg.ops
from benchmarks.harness import Case, Inputs, Peer
from benchmarks.ops.nms import boxes_and_scores, minimal_bytes

THRESHOLD, SIGMA, MIN_SCORE = 0.3, 0.5, 0.001


def make(shape, device, dtype, layout):
    return boxes_and_scores(shape, device, dtype)


def soft_nms_in_torch(method):
    """In PyTorch: every pick updates all scores."""

    def soft_nms(boxes, scores):
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        left = (scores >= MIN_SCORE).nonzero()[:, 0]
        scores = scores[left]
        picks, picked_scores = [], []
        while left.numel() > 0:
            best = scores.argmax()
            pick = left[best]
            picks.append(pick)
            picked_scores.append(scores[best])
            size = torch.minimum(boxes[pick, 2:], boxes[left, 2:]) - torch.maximum(boxes[pick, :2], boxes[left, :2])
            shared = size.clamp(min=0).prod(1)
            overlap = shared / (areas[pick] + areas[left] - shared)
            if method == "gaussian":
                scores = scores * torch.exp(-overlap * overlap / SIGMA)
            else:
                scores = scores * torch.where(overlap > THRESHOLD, 1 - overlap, 1)
            waits = scores >= MIN_SCORE
            waits[best] = False
            left, scores = left[waits], scores[waits]
        return torch.stack(picks), torch.stack(picked_scores)

    return soft_nms


def ours(method):
    return lambda boxes, scores: fastseg.ops.soft_nms(boxes, scores, THRESHOLD, method=method)


def verify(case: Case, inputs: Inputs) -> str | None:
    """The same picks with the same scores; picks whose scores differ only by rounding may be in either order."""
    (indices, decayed), (_, expected) = case.ours(*inputs), next(iter(case.peers.values())).run(*inputs)
    if len(decayed) != len(expected) or len(indices.unique()) != len(indices):
        return f"{len(decayed)} boxes, expected {len(expected)}"
    error = (decayed - expected).abs().max().item()
    return f"scores differ by {error:.3e}" if error > 1e-5 else None


def case(count, method):
    return Case(
        "soft_nms",
        (count, 4),
        make,
        ours(method),
        {"plain": Peer(soft_nms_in_torch(method))},
        minimal_bytes,
        verify,
        name=method,
        backward=False,
        quick_shape=(100, 4),
    )


CASES = [case(count, method) for count in (1000, 5000) for method in ("linear", "gaussian")]
