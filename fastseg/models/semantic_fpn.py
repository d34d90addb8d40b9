"""Semantic FPN, and Panoptic FPN's semantic branch with the merge to one panoptic map.

Kirillov, Girshick, He, Dollár: Panoptic feature pyramid networks (2019); the layers and keys are detectron2's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastseg.models.blocks.convolution import scaled_width
from fastseg.models.blocks.fpn import FPN, SIZE_DIVISOR, SemanticBranch, detectron2_names
from fastseg.models.blocks.normalisation import NORMS, batch_norm
from fastseg.models.blocks.resnet import BLOCKS, ResNet
from fastseg.models.coarse import CoarseNetwork
from fastseg.models.network import renamed
from fastseg.models.panoptic import Segment, panoptic_merge

FPN_CHANNELS = 256
HEAD_CHANNELS = 128


class SemanticFPN(CoarseNetwork):
    """A feature pyramid of a ResNet, each level brought to stride 4, their sum, and the scores of its pixels.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). Images are padded with
    zeros at the bottom and right to multiples of 32, as in detectron2; `coarse_scores` covers the padded image.

    Args:
        num_classes: classes to score; 19 for Cityscapes.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        stride_in_1x1: where a block with a stride has it: in its first 1x1 convolution, as in detectron2's weights, or
            else in the 3x3 convolution, as in torchvision's, which `load_imagenet` takes.
        width_multiplier: scales the width of every layer.
        norm: of the trunk, "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales
            are trained, as in detectron2, which starts from ImageNet's weights).

    Convolutions of the trunk and the branch start from He's normal initialisation, those of the pyramid from Xavier's
    uniform one.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    size_divisor = SIZE_DIVISOR

    def __init__(
        self,
        num_classes: int = 19,
        in_channels: int = 3,
        *,
        layers: int = 101,
        stride_in_1x1: bool = True,
        width_multiplier: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(tuple(BLOCKS), layers=layers)
        self.check_one_of(NORMS, norm=norm)
        trunk = ResNet(layers, in_channels, width_multiplier, stride_in_1x1=stride_in_1x1, norm=batch_norm(norm))
        channels, head_channels = (scaled_width(width, width_multiplier) for width in (FPN_CHANNELS, HEAD_CHANNELS))
        self.backbone = FPN(trunk, channels)
        self.sem_seg_head = SemanticBranch(channels, head_channels, num_classes)

    def release_names(self) -> dict[str, str]:
        return detectron2_names(self.backbone, self.sem_seg_head)

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "SemanticFPN":
        """Copies the trunk of torchvision's ``resnet50``, ``resnet101`` or ``resnet152``; ``fc`` is ignored.

        These weights are made for ``stride_in_1x1=False``.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        sources, names = self.backbone.bottom_up.torchvision_sources("backbone.bottom_up."), self.release_names()
        self.copy_tensors("load_imagenet", state_dict, {renamed(own, "", names): sources[own] for own in sources})
        return self

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.sem_seg_head(self.backbone(image)),)


class PanopticFPN(SemanticFPN):
    """Panoptic FPN's semantic branch: `SemanticFPN` with the 53 stuff classes of COCO, and class 0 for all things.

    The instances come from a detector such as Mask R-CNN. `predict_panoptic` merges them with the stuff that this
    network finds. On COCO the loss of the branch counts half as much as those of the detector.
    """

    def __init__(
        self,
        num_classes: int = 54,
        in_channels: int = 3,
        *,
        layers: int = 101,
        stride_in_1x1: bool = True,
        width_multiplier: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__(
            num_classes,
            in_channels,
            layers=layers,
            stride_in_1x1=stride_in_1x1,
            width_multiplier=width_multiplier,
            norm=norm,
        )

    @torch.no_grad()
    def predict_panoptic(
        self, images: Tensor, instances: Iterable[tuple[Tensor, Tensor, Tensor]], **limits: Any
    ) -> list[tuple[Tensor, list[Segment]]]:
        """For each image the map of segments and what each of them is, by `fastseg.models.panoptic_merge`.

        Args:
            images: (N, in_channels, H, W).
            instances: of each image masks (n, H, W), scores (n,) and classes (n,).
            limits: least_score, most_overlap and least_area of `fastseg.models.panoptic_merge`.
        """
        labels = self.predict(images)
        return [panoptic_merge(*found, own, **limits) for found, own in zip(instances, labels, strict=True)]
