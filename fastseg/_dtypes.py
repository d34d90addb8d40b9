"""Dtypes that several ops share: of their inputs, of their sums, and of their losses."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOATING_GPU = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
LABELS = (torch.int64, torch.int32, torch.uint8)

_ACCUMULATORS = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels compute and sum: fp32 for half types."""
    return _ACCUMULATORS[dtype]


def is_autocast(tensor: Tensor) -> bool:
    """True if autocast is on for the device of `tensor`; False for meta tensors, which have no autocast."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss of `input`: the input's; fp32 for half types under autocast, as in stock PyTorch."""
    if input.dtype in HALF and is_autocast(input):
        return torch.float32
    return input.dtype
