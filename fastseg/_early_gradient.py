"""Gradients that the forward has made already: what is left of the backward."""

from torch import Tensor

from fastseg import _library
from fastseg import _private_api as private
from fastseg._triton import lazy

_scale_on_gpu = lazy("cross_entropy.triton", "scale_in_place")


def scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """gradient * grad_loss, in place where nobody can see the saved gradient again."""
    if type(gradient) is not Tensor or not private.is_last_backward():
        return gradient * grad_loss
    if gradient.is_cpu:
        return gradient if grad_loss.item() == 1 else gradient.mul_(grad_loss)
    if _library.missing("triton") is not None:
        return gradient.mul_(grad_loss)
    _scale_on_gpu(gradient, grad_loss)
    return gradient
