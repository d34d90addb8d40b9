"""Networks for dense prediction."""

from fastseg.models.deconvnet import DeconvNet
from fastseg.models.deeplab_v2 import DeepLabV2ResNet
from fastseg.models.deeplab_v3 import DeepLabV3, DeepLabV3Torchvision
from fastseg.models.deeplab_v3plus import DeepLabV3Plus, DeepLabV3PlusXception
from fastseg.models.deeplab_vgg import DeepLabMSc, DeepLabV1, DeepLabV2VGG
from fastseg.models.dilation import ContextModule, DilationFrontEnd
from fastseg.models.duc import DUC
from fastseg.models.fcn import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from fastseg.models.fcn_alexnet import FCN32sAlexNet
from fastseg.models.fcn_googlenet import FCN32sGoogLeNet
from fastseg.models.fcn_resnet import FCNResNet
from fastseg.models.panoptic import Segment, panoptic_merge
from fastseg.models.pspnet import PSPNet
from fastseg.models.registry import build, list_models
from fastseg.models.segnet import SegNet, SegNetBasic
from fastseg.models.semantic_fpn import PanopticFPN, SemanticFPN
from fastseg.models.shift_and_stitch import shift_and_stitch
from fastseg.models.training import parameter_groups, poly_schedule
from fastseg.models.unet import UNetAarhus, UNetSame, UNetValid, border_weight_map

__all__ = [
    "DUC",
    "ContextModule",
    "DeconvNet",
    "DeepLabMSc",
    "DeepLabV1",
    "DeepLabV2ResNet",
    "DeepLabV2VGG",
    "DeepLabV3",
    "DeepLabV3Plus",
    "DeepLabV3PlusXception",
    "DeepLabV3Torchvision",
    "DilationFrontEnd",
    "FCN8s",
    "FCN8sAtOnce",
    "FCN16s",
    "FCN32s",
    "FCN32sAlexNet",
    "FCN32sGoogLeNet",
    "FCNResNet",
    "PSPNet",
    "PanopticFPN",
    "SegNet",
    "SegNetBasic",
    "Segment",
    "SemanticFPN",
    "UNetAarhus",
    "UNetSame",
    "UNetValid",
    "border_weight_map",
    "build",
    "list_models",
    "panoptic_merge",
    "parameter_groups",
    "poly_schedule",
    "shift_and_stitch",
]
