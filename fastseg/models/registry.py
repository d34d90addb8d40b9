"""The networks by name, each with the arguments that give the published one: `list_models` and `build`.

A new network is one more entry in `MODELS`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
from fastseg.models.network import Network
from fastseg.models.pspnet import PSPNet
from fastseg.models.segnet import SegNet, SegNetBasic
from fastseg.models.semantic_fpn import PanopticFPN, SemanticFPN
from fastseg.models.unet import UNetAarhus, UNetSame, UNetValid

INDEPENDENT_BUILD = "an independent build in torch.nn"


@dataclass(frozen=True)
class Entry:
    """A published network, and its row in docs/models.md.

    Attributes:
        network: its class.
        system: its name in the literature.
        parameters: their number, those that are not trained included.
        follows: the paper or the release that defines it.
        arguments: those of the class, as published.
        verified: what the tests compare it with.
    """

    network: type[Network]
    system: str
    parameters: int
    follows: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    verified: str = INDEPENDENT_BUILD


_FCN = "Long, Shelhamer, Darrell 2015; the Caffe release"
_FCN_VERIFIED = f"{INDEPENDENT_BUILD}; the release's keys and crop offsets"
_SEGNET = "Badrinarayanan, Kendall, Cipolla 2017; the Caffe release"
_SEGNET_VERIFIED = f"{INDEPENDENT_BUILD}; the release's keys and order of layers"
_FPN = "Kirillov, Girshick, He, Dollár 2019; detectron2"
_SMP = "segmentation_models_pytorch"
_FPN_VERIFIED = f"{INDEPENDENT_BUILD}; detectron2's keys; {_SMP}: trunk, pyramid, branch"
_SAME_AS_TORCHVISION = f"{INDEPENDENT_BUILD}; torchvision: keys, scores, gradients"
_DILATION = "Yu, Koltun 2016; the Caffe release"
_CONTEXT_VERIFIED = f"{INDEPENDENT_BUILD}; the identity at the start"
_DEEPLAB_V1 = "Chen, Papandreou, Kokkinos, Murphy, Yuille 2015; the Caffe release"
_DEEPLAB_V2 = "Chen, Papandreou, Kokkinos, Murphy, Yuille 2018; the Caffe release"
_DEEPLAB_V3 = "Chen, Papandreou, Schroff, Adam 2017"
_DEEPLAB_V3PLUS = "Chen, Zhu, Papandreou, Schroff, Adam 2018"
_XCEPTION_VERIFIED = f"{INDEPENDENT_BUILD}; timm: trunk; {_SMP}: separable ASPP, decoder"
_PSPNET = "Zhao, Shi, Qi, Wang, Jia 2017; the authors' semseg"
_PSPNET_VERIFIED = f"{INDEPENDENT_BUILD}; semseg's keys; {_SMP}: pyramid pooling"
_UNET = "Ronneberger, Fischer, Brox 2015"

MODELS: dict[str, Entry] = {
    "fcn32s_vgg16": Entry(FCN32s, "FCN-32s", 136_152_917, _FCN, verified=_FCN_VERIFIED),
    "fcn16s_vgg16": Entry(FCN16s, "FCN-16s", 134_815_994, _FCN, verified=_FCN_VERIFIED),
    "fcn8s_vgg16": Entry(FCN8s, "FCN-8s", 134_489_759, _FCN, verified=_FCN_VERIFIED),
    "fcn8s_atonce_vgg16": Entry(FCN8sAtOnce, "FCN-8s at once", 134_489_759, _FCN, verified=_FCN_VERIFIED),
    "fcn32s_alexnet": Entry(FCN32sAlexNet, "FCN-32s", 58_704_590, _FCN, verified=_FCN_VERIFIED),
    "fcn32s_googlenet": Entry(
        FCN32sGoogLeNet, "FCN-32s", 7_801_413, "Long, Shelhamer, Darrell 2015; torchvision's key names"
    ),
    "fcn_resnet50": Entry(FCNResNet, "FCN", 35_322_218, "torchvision", dict(layers=50), _SAME_AS_TORCHVISION),
    "fcn_resnet101": Entry(FCNResNet, "FCN", 54_314_346, "torchvision", dict(layers=101), _SAME_AS_TORCHVISION),
    "dilation_frontend": Entry(DilationFrontEnd, "Dilated front-end", 134_346_581, _DILATION),
    "context_basic": Entry(ContextModule, "Context module", 28_392, _DILATION, verified=_CONTEXT_VERIFIED),
    "context_large": Entry(
        ContextModule, "Context module", 6_803_139, _DILATION, dict(kind="large"), verified=_CONTEXT_VERIFIED
    ),
    "deeplab_v1_4x4": Entry(DeepLabV1, "DeepLab v1", 65_140_565, _DEEPLAB_V1, dict(network="4x4")),
    "deeplab_v1_largefov": Entry(DeepLabV1, "DeepLab v1", 20_505_429, _DEEPLAB_V1, dict(network="largefov")),
    "deeplab_msc_largefov": Entry(DeepLabMSc, "DeepLab-MSc", 21_711_550, _DEEPLAB_V1, dict(network="largefov")),
    "deeplab_v2_vgg16": Entry(DeepLabV2VGG, "DeepLab v2", 37_877_652, _DEEPLAB_V2),
    "deeplab_v2_resnet101": Entry(
        DeepLabV2ResNet, "DeepLab v2", 44_048_532, _DEEPLAB_V2, verified=f"{INDEPENDENT_BUILD}; isht7's keys"
    ),
    "deeplab_v3_resnet101": Entry(
        DeepLabV3, "DeepLab v3", 58_040_661, _DEEPLAB_V3, verified=f"{INDEPENDENT_BUILD}; {_SMP}: trunk, ASPP, scores"
    ),
    "deeplabv3_resnet50": Entry(
        DeepLabV3Torchvision, "DeepLab v3", 42_004_074, "torchvision", dict(layers=50), _SAME_AS_TORCHVISION
    ),
    "deeplabv3_resnet101": Entry(
        DeepLabV3Torchvision, "DeepLab v3", 60_996_202, "torchvision", dict(layers=101), _SAME_AS_TORCHVISION
    ),
    "deeplab_v3plus_resnet101": Entry(
        DeepLabV3Plus,
        "DeepLab v3+",
        59_344_309,
        _DEEPLAB_V3PLUS,
        verified=f"{INDEPENDENT_BUILD}; jfzhang95's keys; {_SMP}: trunk, ASPP, decoder",
    ),
    "deeplab_v3plus_xception65": Entry(
        DeepLabV3PlusXception,
        "DeepLab v3+",
        41_055_413,
        f"{_DEEPLAB_V3PLUS}; TensorFlow's release",
        dict(layers=65),
        _XCEPTION_VERIFIED,
    ),
    "deeplab_v3plus_xception71": Entry(
        DeepLabV3PlusXception,
        "DeepLab v3+",
        43_477_837,
        f"{_DEEPLAB_V3PLUS}; TensorFlow's release",
        dict(layers=71),
        _XCEPTION_VERIFIED,
    ),
    "pspnet_resnet50": Entry(PSPNet, "PSPNet", 49_180_908, _PSPNET, verified=_PSPNET_VERIFIED),
    "pspnet_resnet101": Entry(
        PSPNet, "PSPNet", 68_072_166, _PSPNET, dict(num_classes=19, layers=101), verified=_PSPNET_VERIFIED
    ),
    "duc_hdc_resnet101": Entry(DUC, "DUC with HDC", 65_038_464, "Wang et al. 2018; TuSimple's release"),
    "segnet": Entry(SegNet, "SegNet", 29_449_355, _SEGNET, verified=_SEGNET_VERIFIED),
    "segnet_basic": Entry(SegNetBasic, "SegNet-Basic", 1_416_587, _SEGNET, verified=_SEGNET_VERIFIED),
    "deconvnet": Entry(
        DeconvNet, "DeconvNet", 251_805_653, "Noh, Hong, Han 2015; the Caffe release", verified=_SEGNET_VERIFIED
    ),
    "unet_valid": Entry(
        UNetValid, "U-Net", 31_030_658, _UNET, verified=f"{INDEPENDENT_BUILD}; weights of borders by definition"
    ),
    "unet_same": Entry(
        UNetSame,
        "U-Net, padded",
        31_037_698,
        f"{_UNET}; milesial's Pytorch-UNet",
        verified=f"{INDEPENDENT_BUILD}; its keys",
    ),
    "unet_aarhus": Entry(UNetAarhus, "U-Net for 128x128 pixels", 2_161_649, f"{_UNET}; a lecture of Aarhus University"),
    "semantic_fpn_resnet101": Entry(SemanticFPN, "Semantic FPN", 47_470_803, _FPN, verified=_FPN_VERIFIED),
    "panoptic_fpn_resnet101": Entry(
        PanopticFPN,
        "Panoptic FPN: semantic branch and merge",
        47_475_318,
        _FPN,
        verified=f"{_FPN_VERIFIED}; a merge pixel by pixel",
    ),
}


def list_models() -> list[str]:
    """The names that `build` takes."""
    return list(MODELS)


def build(name: str, **arguments) -> Network:
    """The network of that name: the published one, except for `arguments`, which are those of its class.

    ``build("fcn_resnet101", num_classes=19)``. ``python -m fastseg.models`` lists names and classes.

    Raises:
        ValueError: an unknown name; the message gives the closest ones.
    """
    if name not in MODELS:
        allowed = difflib.get_close_matches(str(name).lower(), MODELS, cutoff=0.5) or MODELS
        raise ValueError(
            f"fastseg.models.build: name is {name!r}; allowed: those of fastseg.models.list_models(), "
            f"such as {', '.join(allowed)}"
        )
    entry = MODELS[name]
    return entry.network(**{**entry.arguments, **arguments})
