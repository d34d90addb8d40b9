"""Random inputs of the benchmark cases; the caller sets the seed, device, dtype and layout."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.harness import MEMORY_FORMATS

IGNORED = 255


def logits(shape, device: torch.device, dtype: torch.dtype, layout: str) -> Tensor:
    """Normal logits with the spread of a trained network's (sigma 3): (N, C, H, W)."""
    values = torch.randn(shape, device=device).mul_(3).to(dtype)
    return values.contiguous(memory_format=MEMORY_FORMATS[layout])


def labels(shape, classes: int, device: torch.device, ignored_share: float = 0.05) -> Tensor:
    """int64 labels (N, H, W) in blobs of about 16 pixels, similar to segmentation labels; a share is ignored.

    Ignored pixels have the label `IGNORED`; with more than 255 classes, where that is a class, none is ignored.
    """
    coarse = torch.randint(classes, (shape[0], 1, *(-(-extent // 16) for extent in shape[1:])), device=device)
    values = interpolate(coarse.float(), size=tuple(shape[1:]), mode="nearest")[:, 0].long()
    if classes <= IGNORED:
        values[torch.rand(shape, device=device) < ignored_share] = IGNORED
    return values
