"""IoU of packed masks in plain PyTorch: the definition of the op."""

import torch
from torch import Tensor

from fastseg.kernels.pack_masks.reference import unpack_masks

UNION, SMALLER, NOTHING = range(3)  # what the intersection is divided by: `denominator`


def mask_iou(
    words_a: Tensor,
    area_a: Tensor,
    words_b: Tensor,
    area_b: Tensor,
    crowd: Tensor | None,
    labels: Tensor | None,
    denominator: int,
    pairs: bool,
) -> Tensor:
    """words: int32 [N, H, words] and [M, H, words], area: int64 [N] and [M]. Gives [N, M], or [N] for pairs: float32,
    int64 without a division. labels: int64 [N], only if a is b: masks of different labels count as disjoint.
    """
    a, b = (unpack_masks(words, words.shape[2] * 32, torch.float64).flatten(1) for words in (words_a, words_b))
    common = (a * b).sum(1) if pairs else a @ b.T  # exact: integers below 2^53
    if labels is not None:
        common = torch.where(labels.unsqueeze(1) == labels, common, 0.0)
    if denominator == NOTHING:
        return common.long()
    if not pairs:
        area_a = area_a.unsqueeze(1)
    whole = torch.minimum(area_a, area_b) if denominator == SMALLER else area_a + area_b - common
    if crowd is not None:
        whole = torch.where(crowd, area_a, whole)
    return torch.where(whole > 0, common / whole, 0.0).to(torch.float32)
