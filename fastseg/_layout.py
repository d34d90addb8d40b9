"""Memory formats: tests for them, and allocation of tensors in the memory format of another tensor."""

import torch
from torch import Tensor

from fastseg._private_api import in_functional_transform


def is_channels_last(tensor: Tensor) -> bool:
    """True if dim 1 is innermost in memory and the tensor is not contiguous; for any number of dimensions."""
    return tensor.dim() > 2 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()


def empty_as(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor of the shape and memory format of `input` (N, C, ...)."""
    if input.is_contiguous():
        return torch.empty_like(input, dtype=dtype)
    if is_channels_last(input):
        return torch.empty_like(input.movedim(1, -1), dtype=dtype, memory_format=torch.contiguous_format).movedim(-1, 1)
    return torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)


def in_layout_of(input: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the memory format of `empty_as(input)`."""
    if is_channels_last(input):
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def _is_channels_last_image(like: Tensor) -> bool:
    if like.dim() != 4 or like.is_contiguous():
        return False
    if in_functional_transform():  # a batch of torch.func.vmap cannot be tested, and is copied anyway
        return False
    return like.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """`like` and other tensors of its shape as (n,), with elements in the memory order of `like`.

    For elementwise ops: NC... and channels_last are read without a copy.
    """
    channels_last, flat = _is_channels_last_image(like), []
    for tensor in (like, *tensors):
        if channels_last and tensor is not None:
            tensor = tensor.permute(0, 2, 3, 1)
        flat.append(None if tensor is None else tensor.reshape(-1))
    return flat


def like_memory_order(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `in_memory_order`: (n,) values as a view with the shape and memory format of `like`."""
    if _is_channels_last_image(like):
        images, channels, height, width = like.shape
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(like.shape)


def image_format(image: Tensor) -> torch.memory_format:
    """The memory format that torch gives to the result of an op on `image`: channels_last or contiguous.

    The rule of torch's Tensor::suggest_memory_format, by comparisons of strides that tracers support. Unlike torch,
    which takes empty batches for contiguous, it treats them as other batches. Other than (N, C, H, W): contiguous.
    """
    if image.dim() != 4:
        return torch.contiguous_format
    images, channels, height, width = image.stride()
    sizes = image.shape
    if channels == 0:
        return torch.contiguous_format
    least = channels * sizes[1] if sizes[1] > 1 else channels
    if width < least:
        return torch.contiguous_format
    least = width * sizes[3] if sizes[3] > 1 else width
    if height < least:
        return torch.contiguous_format
    least = height * sizes[2] if sizes[2] > 1 else height
    if images < least or least == channels:  # equal: C, H and W are 1, so either format fits
        return torch.contiguous_format
    return torch.channels_last


def in_format_of_first(args: tuple, images: list[int]) -> tuple:
    """`args` with the tensors at the positions `images` dense in the memory format of the first of these."""
    layout = image_format(args[images[0]])
    for position in images:
        if args[position] is not None and not args[position].is_contiguous(memory_format=layout):
            image = args[position].contiguous(memory_format=layout)
            args = (*args[:position], image, *args[position + 1 :])
    return args


def empty_image(like: Tensor, rows: int, columns: int, layout: torch.memory_format) -> Tensor:
    """An uninitialised (N, C, rows, columns) in the memory format `layout`; N, C, dtype and device as `like`."""
    images, channels = like.shape[:2]
    if layout is torch.contiguous_format:  # separate numbers: a tuple of them takes a microsecond more
        return like.new_empty(images, channels, rows, columns)
    size = images, channels, rows, columns
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
