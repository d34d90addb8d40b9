"""Other people's packages with our kernels in them."""

from fastseg.integrations import torchvision

__all__ = ["torchvision"]
