"""roi_pool of 512 boxes, forward and backward; maps and boxes as in benchmarks/ops/roi_align.py."""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.harness import Case, Peer
from benchmarks.ops.max_pool2d import receive
from benchmarks.ops.roi_align import BOXES, make, minimal_bytes, verifier

SCALE, BINS = 0.25, 7


def ours(image, gradient, boxes, bins):
    return receive(fastseg.ops.roi_pool(image, boxes, bins, SCALE), gradient)


def torchvision_roi_pool(image, gradient, boxes, bins):
    from torchvision.ops import roi_pool

    return receive(roi_pool(image, boxes.to(image.dtype), bins, SCALE), gradient)


def adaptive_max_pool(image, gradient, boxes, bins):
    """A loop over boxes, as usual without a kernel; boxes may extend one cell over the border."""
    padded = F.pad(image, (0, 1, 0, 1), value=-float("inf"))
    corners = (boxes[:, 1:].double() * SCALE + 0.5).floor().long().tolist()
    crops = [padded[0, :, top : bottom + 1, left : right + 1] for left, top, right, bottom in corners]
    pooled = torch.stack([F.adaptive_max_pool2d(crop, bins) for crop in crops])
    return receive(torch.where(pooled.isinf(), 0.0, pooled), gradient)


def case(layout="contiguous"):
    torchvision = Peer(torchvision_roi_pool, missing=peers.missing("torchvision"))
    return Case(
        "roi_pool", (1, 256, 200, 336), make(BINS), ours, {"torchvision": torchvision}, minimal_bytes(BINS),
        verifier(adaptive_max_pool), name=f"{BOXES} boxes", layout=layout,
        quick_shape=(1, 16, 25, 42),
    )  # fmt: skip


CASES = [case(), case("channels_last")]
