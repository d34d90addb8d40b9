"""Definition of upsample_argmax in plain PyTorch: the upsampled logits exist, in fp32 (fp64 for fp64)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg._bilinear import interpolate


def _upsampled(input: Tensor, size: Sequence[int], scales: Sequence[float] | None, align_corners: bool) -> Tensor:
    return interpolate(input if input.dtype == torch.float64 else input.float(), size, scales, align_corners)


def upsample_argmax(
    input: Tensor, size: Sequence[int], scales: Sequence[float] | None, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    return _upsampled(input, size, scales, align_corners).argmax(1).to(dtype)


def upsample_argmax_probability(
    input: Tensor, size: Sequence[int], scales: Sequence[float] | None, align_corners: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    logits = _upsampled(input, size, scales, align_corners)
    return logits.argmax(1).to(dtype), logits.softmax(1).amax(1).float()
