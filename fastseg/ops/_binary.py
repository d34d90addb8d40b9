"""Flat views in the order of the memory, for elementwise ops: NC... and channels_last are both read in place."""

import torch
from torch import Tensor

from fastseg._first_op import in_functional_transform


def _channels_last(like: Tensor) -> bool:
    if in_functional_transform():  # a batch of torch.func.vmap does not tell, and the fallback copies anyway
        return False
    return like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` as (n,), its elements in the order in which `like`, of the same shape, stores its own."""
    return (tensor.permute(0, 2, 3, 1) if _channels_last(like) else tensor).reshape(-1)


def like_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse: (n,) values as a view of the shape and memory format of `like`."""
    if _channels_last(like):
        images, channels, height, width = like.shape
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(like.shape)
