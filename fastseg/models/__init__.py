"""Networks for dense prediction."""

from fastseg.models.deconvnet import DeconvNet
from fastseg.models.deeplab_vgg import DeepLabMSc, DeepLabV1, DeepLabV2VGG
from fastseg.models.dilation import ContextModule, DilationFrontEnd
from fastseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from fastseg.models.fcn_alexnet import FCN32sAlexNet
from fastseg.models.fcn_googlenet import FCN32sGoogLeNet
from fastseg.models.fcn_resnet import FCNResNet
from fastseg.models.segnet import SegNet, SegNetBasic
from fastseg.models.shift_and_stitch import shift_and_stitch
from fastseg.models.training import parameter_groups, poly_schedule
from fastseg.models.unet import UNetAarhus, UNetSame, UNetValid, border_weight_map

__all__ = [
    "ContextModule",
    "DeconvNet",
    "DeepLabMSc",
    "DeepLabV1",
    "DeepLabV2VGG",
    "DilationFrontEnd",
    "FCN8s",
    "FCN8sAtOnce",
    "FCN16s",
    "FCN32s",
    "FCN32sAlexNet",
    "FCN32sGoogLeNet",
    "FCNResNet",
    "SegNet",
    "SegNetBasic",
    "UNetAarhus",
    "UNetSame",
    "UNetValid",
    "border_weight_map",
    "parameter_groups",
    "poly_schedule",
    "shift_and_stitch",
]
