"""Dtypes that several ops share: what they take, what they compute in, what a loss is returned in."""

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
    """What kernels compute and sum in: fp32 for half types."""
    return _ACCUMULATORS[dtype]


def is_autocast(tensor: Tensor) -> bool:
    """True if autocast is on for the device of `tensor`; there is none for meta tensors."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss of `input`: its own; fp32 for half types under autocast, as stock PyTorch has it."""
    if input.dtype in HALF and is_autocast(input):
        return torch.float32
    return input.dtype
