"""matrix_nms, gaussian, from bool masks: packing is included. The shape of a case is (N, H, W)."""

import torch

import fastseg.ops
from benchmarks import masks
from benchmarks.harness import Case, Peer


def make(shape, device, dtype, layout):
    return masks.instances(shape, device), torch.rand(shape[0], device=device)


def solo(pixels, scores):
    """SOLOv2's own formulation."""
    order = scores.argsort(descending=True, stable=True)
    overlap = masks.matmul_iou(pixels)[order][:, order].triu(1)
    covered = overlap.amax(0).unsqueeze(1)
    decay = (torch.exp(-2 * overlap.square()) / torch.exp(-2 * covered.square())).amin(0)
    decayed, rank = (scores[order] * decay).sort(descending=True, stable=True)
    kept = decayed >= 0.05
    return order[rank][kept], decayed[kept]


def minimal_bytes(shape, dtype):
    """Every pixel read."""
    return shape[0] * shape[1] * shape[2]


def verify(case, inputs):
    """Compares scores by mask: rounding decides the ranks of nearly equal scores."""
    found = []
    for indices, decayed in (case.ours(*inputs), solo(*[value.cpu() for value in inputs])):
        found.append(torch.zeros(len(inputs[1])).index_put((indices.cpu(),), decayed.cpu()))
    error = (found[0] - found[1]).abs()
    return None if error[found[1] > 0.051].max() < 1e-4 else f"scores are off by {error.max().item()}"


CASES = [
    Case("matrix_nms", (500, 200, 304), make, fastseg.ops.matrix_nms, {"matmul": Peer(solo)}, minimal_bytes, verify,
         dtype=torch.bool, backward=False, quick_shape=(10, 24, 64))
]  # fmt: skip
