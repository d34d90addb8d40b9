"""Makes other packages use our kernels."""

from fastseg.integrations import torchvision

__all__ = ["torchvision"]
