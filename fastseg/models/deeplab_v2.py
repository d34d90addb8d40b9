"""DeepLab v2 on ResNet-101: scores by several dilations, at several scales of the image.

Chen, Papandreou, Kokkinos, Murphy, Yuille: DeepLab, semantic image segmentation with deep convolutional nets, atrous
convolution, and fully connected CRFs (2017).
"""

import torch
from torch import Tensor

from fastseg import ops
from fastseg.models.blocks.atrous import SCORE_RATES, AtrousScores
from fastseg.models.blocks.normalisation import batch_norm
from fastseg.models.blocks.resnet import ResNet
from fastseg.models.blocks.resnet_network import ResNetNetwork, check_resnet_arguments, names_below
from fastseg.models.network import IGNORED_LABEL

MORE_SCALES = ((3, 4), (1, 2))  # numerators and denominators


class DeepLabV2ResNet(ResNetNetwork):
    """DeepLab v2 on ResNet, with the maximum of the scores at three scales of the image.

    Called on an image (N, in_channels, H, W) it returns class scores (N, num_classes, H, W). The image is scored at its
    size, 0.75 and 0.5 of it, each on a grid of stride 8; the maximum of the three is interpolated. All resizing aligns
    corners: sizes of 8k + 1, such as 321 and 513, fit exactly. Keys of isht7's PyTorch version, whose
    trunk is the release's: ``Scale.conv1`` ... ``Scale.layer4.*``, ``Scale.layer5.conv2d_list.{0..3}``.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        layers: of the ResNet: 50, 101 or 152.
        multi_scale: whether the image is scored at three scales; else at its own.
        rates: dilations of the convolutions whose scores are added.
        stride_in_1x1: the stride of a stage is that of its first 1x1 convolution, as in the Caffe release. With False
            it is in the 3x3 convolution, as in the networks that `load_imagenet` takes the weights of.
        width_multiplier: scales the width of every layer.
        norm: "frozen", as in the release (neither statistics nor scales are trained), "batch" or "sync".

    Convolutions of the trunk start from He's normal initialisation or from `load_imagenet`; score layers from a normal
    distribution of deviation 0.01. The release's images are BGR, 0 to 255, minus the mean colour.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    align_corners = True
    backbone_keys = "Scale."

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        layers: int = 101,
        multi_scale: bool = True,
        rates: tuple[int, ...] = SCORE_RATES,
        stride_in_1x1: bool = True,
        width_multiplier: float = 1.0,
        norm: str = "frozen",
    ):
        super().__init__(num_classes, in_channels)
        check_resnet_arguments(self, layers=layers, width_multiplier=width_multiplier, norm=norm)
        if not rates or min(rates) < 1:
            raise ValueError(f"{self.name}: rates is {rates}; allowed: integers, each 1 or more")
        self.multi_scale = multi_scale
        self.backbone = ResNet(
            layers,
            in_channels,
            width_multiplier,
            stride_in_1x1=stride_in_1x1,
            ceil_mode=True,
            output_stride=8,
            norm=batch_norm(norm),
        )
        self.classifier = AtrousScores(self.backbone.channels[-1], num_classes, rates)

    def release_names(self) -> dict[str, str]:
        return names_below(self.backbone, "backbone.", "Scale.") | names_below(
            self.classifier, "classifier.", "Scale.layer5."
        )

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The maximum of the scores at all scales; while training, also those at each scale, on its own grid."""
        maps = [self.classifier(self.backbone(image)[-1])]
        if not self.multi_scale:
            return (maps[0],)
        size, fused = tuple(maps[0].shape[2:]), maps[0]
        for numerator, denominator in MORE_SCALES:
            smaller = [side * numerator // denominator + 1 for side in image.shape[2:]]
            resized = ops.upsample_bilinear2d(image, smaller, align_corners=True)
            maps.append(self.classifier(self.backbone(resized)[-1]))
            fused = torch.maximum(fused, ops.upsample_bilinear2d(maps[-1], size, align_corners=True))
        return (fused, *maps) if self.training else (fused,)

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Sum of the cross entropies of the fused scores and, while training, of those at each scale.

        As in the release, scores are not interpolated: each is compared with the label of the pixel at its place, or
        of the nearest one, with aligned corners (every eighth label, for sizes of 8k + 1).

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.cross_entropy`, such as weight, pixel_weight and ignore_index; reduction is
                "mean" or "sum".
        """
        self.check_image(images)
        self.check_targets(images, targets)
        options = {"ignore_index": IGNORED_LABEL, **options}
        pixel_weight = options.pop("pixel_weight", None)
        losses = []
        for scores in self.score_maps(images):
            size = tuple(scores.shape[2:])
            weight = None if pixel_weight is None else _at_scores(pixel_weight, size)
            losses.append(ops.cross_entropy(scores, _at_scores(targets, size), pixel_weight=weight, **options))
        return torch.stack(losses).sum()


def _at_scores(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, H, W) at the pixels nearest to the scores of a grid of `size` with aligned corners."""
    for dim, count in ((1, size[0]), (2, size[1])):
        steps, last = max(1, count - 1), values.shape[dim] - 1
        places = torch.arange(count, device=values.device)
        values = values.index_select(dim, (2 * last * places + steps) // (2 * steps))  # rounded, in integers
    return values
