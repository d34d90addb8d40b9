"""Networks for dense prediction."""

from fastseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s

__all__ = ["FCN32s", "FCN16s", "FCN8s", "FCN8sAtOnce"]
