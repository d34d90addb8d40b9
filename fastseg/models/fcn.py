"""Fully convolutional networks on VGG16: FCN-32s, FCN-16s, FCN-8s and FCN-8s at-once.

Long, Shelhamer, Darrell: Fully convolutional networks for semantic segmentation (2015). VGG16's fully
connected layers become convolutions, a 1x1 layer scores the classes, and bilinear upsampling brings the
coarse scores to the size of the image. The skip versions add the scores of pool4 (16s) and of pool3 as well
(8s) before the last upsampling. Parameter names are those of the Caffe release and of pytorch-fcn.
"""

from typing import cast

import torch
from torch import Tensor

from fastseg import ops
from fastseg.models.blocks.heads import score_layer
from fastseg.models.blocks.upsampling import MODES, upsampled, upsampling_layer, with_skip
from fastseg.models.blocks.vgg16 import FullyConvolutionalVGG16, convolution_names, numbered, torchvision_sources
from fastseg.models.network import IGNORED_LABEL, Network

PADDINGS = ("pad100", "same")


class FCN(Network):
    """The base class of `FCN32s`, `FCN16s`, `FCN8s` and `FCN8sAtOnce`: arguments, initialisation and errors.

    Called on an image ``(N, in_channels, H, W)`` a network returns class scores ``(N, num_classes, H, W)``.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        padding: ``"pad100"`` pads the image by 100 and crops at fixed offsets, as in the Caffe release.
            ``"same"`` keeps every map aligned with the image, ``ceil(H / stride)`` high: nothing is cropped
            if H and W are multiples of 32, and only the bottom and right otherwise. Both have the same state
            dict, so weights can be exchanged.
        upsampling: ``"fixed"`` (bilinear transposed convolution that is not trained,
            ``requires_grad=False``), ``"learned"`` (the same layer, trained) or ``"interp"`` (bilinear
            interpolation, equal to ``"fixed"`` in the interior; it has no parameters, so the state dict has
            no ``upscore`` keys).
        width_multiplier: scales the width of every trunk layer; 1 is VGG16.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.

    Score layers start at zero, transposed convolutions bilinear, the trunk from `load_imagenet` or else He
    normal. An FCN-16s starts from a trained FCN-32s and an FCN-8s from an FCN-16s, by
    ``load_state_dict(..., strict=False)``.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape ``(N, in_channels, H, W)``.
    """

    stride: int  # of the last upsampling

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        padding: str = "pad100",
        upsampling: str = "fixed",
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(PADDINGS, padding=padding)
        self.check_one_of(MODES, upsampling=upsampling)
        self.padding, self.upsampling = padding, upsampling
        first_padding, fc6_padding = (100, 0) if padding == "pad100" else (1, 3)
        self.trunk = FullyConvolutionalVGG16(
            in_channels, width_multiplier, first_padding=first_padding, fc6_padding=fc6_padding, dropout=dropout
        )
        self.pool3_channels, self.pool4_channels, fc7_channels = self.trunk.channels
        self.score_fr = self._score_layer(fc7_channels)
        self._build_skips()

    def release_names(self) -> dict[str, str]:
        fully_connected = {f"trunk.fully_connected.{layer}": layer for layer in ("fc6", "fc7")}
        return convolution_names("trunk.stages") | fully_connected

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "FCN":
        """Copies the weights of torchvision's ``vgg16`` (``features.N`` and ``classifier.N``) into the trunk.

        The fully connected layers become convolutions; ImageNet's output layer, ``classifier.6``, is ignored.
        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        layers = [*(f"conv{stage}_{layer}" for stage, layer in numbered()), "fc6", "fc7"]
        sources = torchvision_sources(state_dict, dict.fromkeys(layers))
        self.copy_tensors("load_imagenet", state_dict, sources)
        return self

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps of ``pool3`` (stride 8), ``pool4`` (16) and ``fc7`` (32)."""
        self.check_image(image)
        return self.trunk(image)

    def _build_skips(self):
        raise NotImplementedError("use FCN32s, FCN16s, FCN8s or FCN8sAtOnce")

    def coarse_scores(self, image):
        """Class scores before the last upsampling, for losses and predictions that include the upsampling.

        With ``padding="same"`` and H, W multiples of 32 the map has ``H / stride`` rows and ``W / stride``
        columns on half-pixel centres: interpolating it bilinearly (``align_corners=False``) gives the scores
        at every pixel. With ``"pad100"`` it covers the padded image, so it begins outside the image itself.
        """
        raise NotImplementedError

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """As `Network.loss`; where the scores are interpolated, those of full size are never made."""
        if not self._interpolates_whole(images):
            return super().loss(images, targets, **options)
        self.check_targets(images, targets)
        options = {"ignore_index": IGNORED_LABEL, **options}
        return ops.upsample_cross_entropy(self.coarse_scores(images), targets, **options)

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        if not self._interpolates_whole(images):
            return super().predict(images, dtype)
        return cast(Tensor, ops.upsample_argmax(self.coarse_scores(images), images.shape[2:], dtype=dtype))

    def _interpolates_whole(self, images: Tensor) -> bool:
        """True if the scores of the image are its coarse scores interpolated to its size, without a crop."""
        whole = all(length % self.stride == 0 for length in images.shape[2:])
        return whole and self.upsampling == "interp" and self.padding == "same"

    def _score_layer(self, channels):
        return score_layer(channels, self.num_classes, deviation=0.0)

    def _upsampling_layer(self, stride):
        padding = 0 if self.padding == "pad100" else stride // 2
        return upsampling_layer(self.num_classes, stride, padding, self.upsampling)

    def _upsampled(self, layer, image, offset):
        return upsampled(layer, self.coarse_scores(image), (offset, offset), image.shape[2:])

    def _offset(self, transposed, interpolated):
        """Where to crop: ``transposed`` is the release's offset with "pad100"; ``interpolated`` is the offset
        for interpolated maps, which lack the stride / 2 margin of an unpadded transposed convolution."""
        if self.padding == "same":
            return 0
        return interpolated if self.upsampling == "interp" else transposed


class FCN32s(FCN):
    """FCN-32s: the scores of ``fc7``, upsampled 32 times. Arguments: see `FCN`."""

    stride = 32

    def _build_skips(self):
        self.upscore = self._upsampling_layer(32)

    def coarse_scores(self, image):
        _, _, fc7 = self.features(image)
        return self.score_fr(fc7)

    def forward(self, image):
        return self._upsampled(self.upscore, image, self._offset(19, 3))


class FCN16s(FCN):
    """FCN-16s: the scores of ``fc7`` and ``pool4``, upsampled 16 times. Arguments: see `FCN`."""

    stride = 16

    def _build_skips(self):
        self.upscore2 = self._upsampling_layer(2)
        self.score_pool4 = self._score_layer(self.pool4_channels)
        self.upscore16 = self._upsampling_layer(16)

    def coarse_scores(self, image):
        _, pool4, fc7 = self.features(image)
        return with_skip(self.upscore2, self.score_fr(fc7), self.score_pool4(pool4), self._offset(5, 6))

    def forward(self, image):
        return self._upsampled(self.upscore16, image, self._offset(27, 3))


class FCN8s(FCN):
    """FCN-8s: the scores of ``fc7``, ``pool4`` and ``pool3``, upsampled 8 times. Arguments: see `FCN`."""

    stride = 8

    def _build_skips(self):
        self.upscore2 = self._upsampling_layer(2)
        self.score_pool4 = self._score_layer(self.pool4_channels)
        self.upscore_pool4 = self._upsampling_layer(2)
        self.score_pool3 = self._score_layer(self.pool3_channels)
        self.upscore8 = self._upsampling_layer(8)

    def coarse_scores(self, image):
        pool3, pool4, fc7 = self.features(image)
        scores = with_skip(self.upscore2, self.score_fr(fc7), self.score_pool4(pool4), self._offset(5, 6))
        return with_skip(self.upscore_pool4, scores, self.score_pool3(pool3), self._offset(9, 12))

    def forward(self, image):
        return self._upsampled(self.upscore8, image, self._offset(31, 3))


class FCN8sAtOnce(FCN8s):
    """FCN-8s trained in one stage instead of from an FCN-16s. Arguments: see `FCN`.

    ``pool4`` is multiplied by 0.01 and ``pool3`` by 0.0001 before its score layer, which balances the
    magnitudes of the ImageNet VGG16.
    """

    def features(self, image):
        pool3, pool4, fc7 = super().features(image)
        return pool3 * 0.0001, pool4 * 0.01, fc7
