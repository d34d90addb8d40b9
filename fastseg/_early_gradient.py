"""The backward of losses whose gradient was computed in the forward: multiplies it by the incoming gradient."""

import torch
from torch import Tensor

from fastseg import _library
from fastseg import _private_api as private
from fastseg._triton import lazy

_scale_on_gpu = lazy("cross_entropy.triton", "scale_in_place")


def scaled(gradient: Tensor, grad_loss: Tensor, backend: str) -> Tensor:
    """gradient * grad_loss, in place if the saved gradient is not used again. backend: of the forward."""
    if type(gradient) is not Tensor or not private.is_last_backward():
        return gradient * grad_loss
    if gradient.is_cpu:
        return gradient if grad_loss.item() == 1 else gradient.mul_(grad_loss)
    if backend == "reference" or _library.missing("triton") is not None:
        return gradient.mul_(grad_loss)
    _scale_on_gpu(gradient, grad_loss)
    return gradient


def scaled_mean(gradient: Tensor, grad_loss: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * grad_loss / count in `dtype`: `gradient` is that of a sum, the loss is the mean sum / count.

    0 for a mean over nothing.
    """
    if type(gradient) is Tensor and gradient.is_cpu and not private.in_functional_transform():
        number = count.item()
        return (gradient * (grad_loss.item() / number if number else 0.0)).to(dtype)
    return (gradient * share(grad_loss, count)).to(dtype)


def share(grad_loss: Tensor, count: Tensor) -> Tensor:
    """grad_loss / count in fp64: the gradient of a sum, from that of its mean; 0 for a mean over nothing."""
    empty = count == 0
    return torch.where(empty, 0.0, grad_loss.double() / torch.where(empty, 1.0, count))
