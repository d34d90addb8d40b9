"""matrix_nms: scores of masks decay by their overlap with better masks (SOLOv2, arXiv 2003.10152, section 3.3).

With o_ij the IoU of masks i and j of one label (else 0), i before j by score, and c_i = max_(k<i) o_ki,

    s_j <- s_j min_(i<j) f(o_ij) / f(c_i)       f(o) = exp(-sigma o^2) (gaussian) or 1 - o (linear)
"""

from typing import Literal

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.mask_iou.reference import UNION
from fastseg.kernels.matrix_nms import reference
from fastseg.ops.masks.mask_iou import mask_iou_op
from fastseg.ops.masks.mask_nms import ranking
from fastseg.ops.masks.pack_masks import packed_from
from fastseg.ops.masks.packed import PackedMasks

_NAME = "matrix_nms"


def check(iou, order, labels, sigma):
    count = iou.shape[0] if iou.dim() else 0
    _check.argument(_NAME, "iou", iou, (torch.float32,), (count, count))
    _check.argument(_NAME, "order", order, (torch.int64,), (count,), like=("iou", iou))
    if labels is not None:
        _check.argument(_NAME, "labels", labels, (torch.int64,), (count,), like=("iou", iou))
    _check.in_range(_NAME, "sigma", sigma, 0, 1e30)


def outputs(iou):
    return iou.new_empty(iou.shape[0])


matrix_decay_op = Op(
    "matrix_decay(Tensor iou, Tensor order, Tensor? labels, bool gaussian, float sigma) -> Tensor decay",
    check=check,
    outputs=outputs,
    internal=True,
    contiguous=("iou", "order", "labels"),
    backends=rows(reference.matrix_decay, cpu=(torch.float32,), cuda=(torch.float32,)),
)


def matrix_nms(
    masks: PackedMasks | Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
    min_score: float = 0.05,
    max_output: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Matrix NMS: no mask is suppressed; each score decays by the overlap with better masks, all at once.

    Args:
        masks: N masks: `PackedMasks`, or (N, H, W) of bool or uint8, which is packed first. The IoU of all pairs of one
            label is computed, 4 N^2 bytes.
        scores: (N), float32, float16, bfloat16 or float64, computed in float32. Equal scores rank by index.
        labels: int64, int32 or uint8 (N): only masks of the same label decay each other. None: all have the same.
        method: "gaussian" or "linear".
        sigma: of the gaussian, 0 or more; it multiplies the squared IoU.
        min_score: scores that decay below it are dropped; NaN scores, too.
        max_output: with an int M the result has a static shape, as in `mask_nms`: the best M masks.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        indices int64 (K) and decayed scores float32 (K), best first. With max_output: indices (M), -1 after the last,
        scores (M), 0 there, and their number, int64 (). Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: another method, a negative sigma, a min_score that is NaN, a negative max_output.
        TypeError: arguments of other types.
    """
    masks = packed_from(_NAME, "masks", masks)
    _check.one_of(_NAME, "method", method, ("gaussian", "linear"))
    sigma, min_score = _check.numbers(_NAME, sigma=sigma, min_score=min_score)
    _check.in_range(_NAME, "sigma", sigma, 0, 1e30)
    _check.in_range(_NAME, "min_score", min_score, -torch.inf, torch.inf)
    order, labels = ranking(_NAME, masks, scores, labels)
    max_output = _check.max_output(_NAME, max_output)
    known = masks.words, masks.area, masks.boxes
    iou = mask_iou_op(*known, *known, None, labels, UNION, False, backend=backend)
    decay = matrix_decay_op(iou, order, labels, method == "gaussian", sigma, backend=backend)
    decayed = scores.detach().float()[order] * decay
    decayed = torch.where(decayed >= min_score, decayed, -torch.inf)
    decayed, rank = decayed.sort(descending=True, stable=True)
    indices, count = order[rank], (decayed > -torch.inf).sum()
    if max_output is None:
        kept = int(count)
        return indices[:kept], decayed[:kept]
    indices = torch.cat([indices, indices.new_full((max_output,), -1)])[:max_output]
    decayed = torch.cat([decayed, decayed.new_zeros(max_output)])[:max_output]
    count = count.clamp(max=max_output)
    filled = torch.arange(max_output, device=indices.device) < count
    return torch.where(filled, indices, -1), torch.where(filled, decayed, 0), count
