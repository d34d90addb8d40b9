"""Views of tensors [N, C, d1, ..., dk] for the Triton kernels of the softmax losses; PixelWalk is the same in C++."""

from torch import Tensor

from fastseg._layout import is_channels_last


def pixel_views(*tensors: Tensor | None, may_join: bool = True) -> list[Tensor | None]:
    """[N, C, P] views with unit class or pixel stride, None for None; a copy if a tensor's strides allow no view.

    If the classes are innermost in all of them (or an image is one pixel), and `may_join`, [1, C, N P] views. Outputs
    are dense, so they are never copied.
    """
    joined = may_join and all(_joins(tensor) for tensor in tensors if tensor is not None)
    return [None if tensor is None else _view(tensor, joined) for tensor in tensors]


def _joins(tensor: Tensor) -> bool:
    if tensor.dim() == 2 or tensor.numel() == tensor.shape[0] * tensor.shape[1]:
        return True
    return is_channels_last(tensor) and tensor.movedim(1, -1).is_contiguous()


def _view(tensor: Tensor, joined: bool) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_empty((1, tensor.shape[1], 0))
    if joined:
        view = tensor.movedim(1, 0).flatten(1).unsqueeze(0)
    else:
        view = tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)
    return view if 1 in view.stride()[1:] else view.contiguous()
