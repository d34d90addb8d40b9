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
