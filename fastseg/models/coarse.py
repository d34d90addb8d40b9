"""Networks whose class scores are interpolated to the pixels of the image."""

import torch
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

    def score_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The coarse scores (N, num_classes, h, w); while training, those of the auxiliary heads after them."""
        raise NotImplementedError

    def coarse_scores(self, image: Tensor) -> Tensor:
        """The scores (N, num_classes, h, w) on the network's own grid, which covers the image."""
        self.check_image(image)
        return self.score_maps(image)[0]

    def forward(self, image: Tensor) -> Tensor:
        return ops.upsample_bilinear2d(
            self.coarse_scores(image), tuple(image.shape[2:]), align_corners=self.align_corners
        )

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy of the interpolated scores, the mean over the labelled pixels unless `options` say otherwise.

        While training, the losses of the auxiliary heads are added, each times its weight in `auxiliary_weights`.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.upsample_cross_entropy`, such as weight, ignore_index and reduction.
        """
        self.check_image(images)
        options = {"ignore_index": IGNORED_LABEL, "align_corners": self.align_corners, **options}
        scores, *auxiliary = self.score_maps(images)
        loss = ops.upsample_cross_entropy(scores, targets, **options)
        for weight, scores in zip(self.auxiliary_weights, auxiliary, strict=bool(auxiliary)):
            loss = loss + weight * ops.upsample_cross_entropy(scores, targets, **options)
        return loss

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        scores = self.coarse_scores(images)
        return ops.upsample_argmax(scores, tuple(images.shape[2:]), align_corners=self.align_corners, dtype=dtype)


class SubsampledNetwork(CoarseNetwork):
    """A coarse network whose score (i, j) is that of pixel (stride i, stride j), and which learns from these pixels.

    Scores are interpolated between these pixels; beyond the last of them they are the last one.
    """

    align_corners = True
    stride = 8

    def forward(self, image: Tensor) -> Tensor:
        scores, size = self._covering(image)
        scores = ops.upsample_bilinear2d(scores, size, align_corners=True)
        return scores[:, :, : image.shape[2], : image.shape[3]]

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy at every 8th pixel, the mean over the labelled ones unless `options` say otherwise.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8; 255 is ignored.
            options: those of `fastseg.ops.cross_entropy`, such as weight, ignore_index and reduction.
        """
        labels = targets[:, :: self.stride, :: self.stride]
        scores = self.coarse_scores(images)[:, :, : labels.shape[1], : labels.shape[2]]
        return ops.cross_entropy(scores, labels, **{"ignore_index": IGNORED_LABEL, **options})

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        scores, size = self._covering(images)
        labels = ops.upsample_argmax(scores, size, align_corners=True, dtype=dtype)
        return labels[:, : images.shape[2], : images.shape[3]]

    def _covering(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The scores with the last row and column repeated where pixels follow them, and the size they cover."""
        scores = self.coarse_scores(image)
        for axis in (2, 3):
            if self.stride * (scores.shape[axis] - 1) + 1 < image.shape[axis]:
                scores = torch.cat([scores, scores.narrow(axis, -1, 1)], axis)
        height, width = (self.stride * (length - 1) + 1 for length in scores.shape[2:])
        return scores, (height, width)
