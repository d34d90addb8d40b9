"""Networks for dense prediction."""

from fastseg.models.deconvnet import DeconvNet
from fastseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from fastseg.models.segnet import SegNet, SegNetBasic

__all__ = ["DeconvNet", "FCN8s", "FCN8sAtOnce", "FCN16s", "FCN32s", "SegNet", "SegNetBasic"]
