"""Memory formats: how a tensor lies in memory, and room for a tensor that lies as another one does."""

import torch
from torch import Tensor

from fastseg._private_api import in_functional_transform


def is_channels_last(tensor: Tensor) -> bool:
    """True if dim 1 is the innermost of a tensor of any number of dimensions, and the tensor is not contiguous."""
    return tensor.dim() > 2 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()


def empty_as(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a tensor like `input` (N, C, ...), dense, in its memory format."""
    if input.is_contiguous():
        return torch.empty_like(input, dtype=dtype)
    if is_channels_last(input):
        return torch.empty_like(input.movedim(1, -1), dtype=dtype, memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)


def in_layout_of(input: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` as `empty_as(input)` would lie."""
    if is_channels_last(input):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def _is_channels_last_image(like: Tensor) -> bool:
    if like.dim() != 4 or like.is_contiguous():
        return False
    if in_functional_transform():  # a batch of torch.func.vmap does not tell, and the fallback copies anyway
        return False
    return like.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """`like` and other tensors of its shape as (n,), their elements in the order in which `like` stores its own.

    For elementwise ops: NC... and channels_last are both read in place.
    """
    channels_last, flat = _is_channels_last_image(like), []
    for tensor in (like, *tensors):
        if channels_last and tensor is not None:
            tensor = tensor.permute(0, 2, 3, 1)
        flat.append(None if tensor is None else tensor.reshape(-1))
    return flat


def like_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse: (n,) values as a view of the shape and memory format of `like`."""
    if _is_channels_last_image(like):
        images, channels, height, width = like.shape
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(like.shape)
