"""Networks whose class scores are interpolated to the pixels of the image."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import ops
from fastseg.models.network import IGNORED_LABEL, Network


class CoarseNetwork(Network):
    """A network that scores a coarse grid and interpolates the scores bilinearly.

    `loss` and `predict` sample the coarse scores where they need them: scores at full size are never made. `forward`
    makes them, (N, num_classes, H, W).

    A subclass has `score_maps`.
    """

    align_corners = False  # of the interpolation
    auxiliary_weights: tuple[float, ...] = ()  # of the losses of `score_maps` after the first
    size_divisor = 1  # images are padded with zeros, at the bottom and right, to multiples of it

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The coarse scores (N, num_classes, h, w); while training, those of the auxiliary heads after them."""
        raise NotImplementedError

    def coarse_scores(self, image: Tensor) -> Tensor:
        """The scores (N, num_classes, h, w) on the network's own grid, which covers the image, padded if needed."""
        self.check_image(image)
        return self.score_maps(self._padded(image))[0]

    def covering_scores(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The coarse scores, and the rows and columns that they cover, of which the image is the top left part."""
        return self.coarse_scores(image), self._padded_size(*image.shape[2:])

    def _padded_size(self, height: int, width: int) -> tuple[int, int]:
        return height + -height % self.size_divisor, width + -width % self.size_divisor

    def _padded(self, maps: Tensor, value: float = 0) -> Tensor:
        if self.size_divisor == 1:
            return maps
        height, width = maps.shape[-2:]
        rows, columns = self._padded_size(height, width)
        return F.pad(maps, (0, columns - width, 0, rows - height), value=value)

    def forward(self, image: Tensor) -> Tensor:
        scores, size = self.covering_scores(image)
        scores = ops.upsample_bilinear2d(scores, size, align_corners=self.align_corners)
        return scores[..., : image.shape[2], : image.shape[3]]

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy of the interpolated scores, the mean over the labelled pixels unless `options` say otherwise.

        While training, the losses of the auxiliary heads are added, each times its weight in `auxiliary_weights`.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.upsample_cross_entropy`, such as weight, ignore_index and reduction.
        """
        self.check_image(images)
        self.check_targets(images, targets)
        options = {"ignore_index": IGNORED_LABEL, "align_corners": self.align_corners, **options}
        if self.size_divisor == 1:
            return self._loss_of_maps(images, targets, options)
        loss = self._loss_of_maps(self._padded(images), *self._padded_targets(targets, options))
        return loss[..., : images.shape[2], : images.shape[3]] if loss.dim() else loss

    def _loss_of_maps(self, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        scores, *auxiliary = self.score_maps(images)
        loss = ops.upsample_cross_entropy(scores, targets, **options)
        for weight, scores in zip(self.auxiliary_weights, auxiliary, strict=bool(auxiliary)):
            loss = loss + weight * ops.upsample_cross_entropy(scores, targets, **options)
        return loss

    def _padded_targets(self, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict]:
        """Targets and options for padded images: the padding is ignored."""
        if targets.dtype == torch.uint8 and not 0 <= options["ignore_index"] <= 255:
            targets = targets.int()  # the ignored label is not a uint8
        if options.get("pixel_weight") is not None:
            options["pixel_weight"] = self._padded(options["pixel_weight"])
        return self._padded(targets, options["ignore_index"]), options

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        scores, size = self.covering_scores(images)
        labels = cast(Tensor, ops.upsample_argmax(scores, size, align_corners=self.align_corners, dtype=dtype))
        return labels[..., : images.shape[2], : images.shape[3]].contiguous()


class SubsampledNetwork(CoarseNetwork):
    """A coarse network that learns from every `label_stride`-th pixel: score (i, j) is that of pixel (s i, s j).

    Scores are interpolated between these pixels; beyond the last one, its score is repeated.
    """

    align_corners = True
    label_stride = 8

    def covering_scores(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        scores = self.coarse_scores(image)
        for axis in (2, 3):
            if self.label_stride * (scores.shape[axis] - 1) + 1 < image.shape[axis]:
                scores = torch.cat([scores, scores.narrow(axis, -1, 1)], axis)
        height, width = (self.label_stride * (length - 1) + 1 for length in scores.shape[2:])
        return scores, (height, width)

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy at every `label_stride`-th pixel, the mean over the labelled ones unless `options` differ.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.cross_entropy`, such as weight, pixel_weight, ignore_index and reduction.
        """
        self.check_image(images)
        self.check_targets(images, targets)
        step = self.label_stride
        labels = targets[..., ::step, ::step]
        scores = self.coarse_scores(images)[:, :, : labels.shape[-2], : labels.shape[-1]]
        options = {"ignore_index": IGNORED_LABEL, **options}
        if options.get("pixel_weight") is not None:
            options["pixel_weight"] = options["pixel_weight"][..., ::step, ::step]
        return ops.cross_entropy(scores, labels, **options)
