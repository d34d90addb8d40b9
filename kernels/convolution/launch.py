"""Shared by the Triton launchers of the three maps; does not import triton."""

import functools

import torch
from torch import Tensor

from fastseg._layout import image_format
from fastseg._triton import MAX_SHARED

MOST_BYTES = 16  # of one access
LARGE_SHARED = 160 * 1024  # bytes of shared memory of a block, more than smaller GPUs have
LEAST_COPY = 4  # bytes that one access must move to be asynchronous
MOST_OFFSETS = 2**31 - 2**16  # so that a block that extends beyond the last pixel still fits 32 bits


def is_channels_last(image: Tensor) -> bool:
    """Whether the kernels treat `image` (N, C, H, W), dense in either format, as channels_last."""
    return image_format(image) is torch.channels_last


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: "tf32" where PyTorch's setting for convolutions allows it. Unused for other dtypes."""
    if dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def strides(image: Tensor | None) -> tuple[int, int, int, int]:
    """(image, channel, row, column), zeros for None; for dense images those of the format, even where a size is 1."""
    if image is None:
        return 0, 0, 0, 0
    _, channels, height, width = image.shape
    if image.is_contiguous():
        return channels * height * width, height * width, width, 1
    if image.is_contiguous(memory_format=torch.channels_last):
        return channels * height * width, 1, width * channels, channels
    return image.stride()


def is_wide(*images: Tensor | None) -> bool:
    """Whether an offset into one of these, or the number of their pixels, needs 64 bits."""
    for image in images:
        if image is not None:
            extent = sum((size - 1) * abs(step) for size, step in zip(image.shape, strides(image)))
            if max(extent, image.shape[0] * image.shape[2] * image.shape[3]) >= MOST_OFFSETS:
                return True
    return False


def run_of(image: Tensor, run: int) -> int:
    """How many neighbouring pixels one access of `image` can take if runs of `run` pixels start at multiples of it."""
    run = min(run, MOST_BYTES // image.element_size())
    while image.data_ptr() % (run * image.element_size()):
        run //= 2
    return run


def packed(weight: Tensor, groups: int, transposed: bool, block_k: int, block_c: int) -> Tensor:
    """[groups, taps, K, C] with the channels C that are summed innermost, K and C filled up to blocks with zeros.

    weight: (K, C / groups, R, S), or transposed (C, K / groups, R, S). A view if the weight already has this layout.
    """
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    found = split.permute(0, 3, 2, 1) if transposed else split.permute(0, 3, 1, 2)
    out_channels, channels = found.shape[2:]
    if out_channels % block_k or channels % block_c:
        size = groups, found.shape[1], -(-out_channels // block_k) * block_k, -(-channels // block_c) * block_c
        room = weight.new_zeros(size)
        room[:, :, :out_channels, :channels] = found
        return room
    return found if found.stride(3) == 1 else found.contiguous()


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Blocks that run at once, at least; 1 in the interpreter, where few blocks are faster."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return MAX_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # ROCm: no opt-in


def weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """(output channel, channel, tap) of a weight (K, C, R, S) that is dense in either format."""
    _, channels, height, width = weight.shape
    if weight.is_contiguous():
        return channels * height * width, height * width, 1
    return channels * height * width, 1, channels
