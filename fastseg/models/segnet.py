"""SegNet on VGG16, SegNet-Basic, and the class weights its release trains with.

Badrinarayanan, Kendall, Cipolla: SegNet, a deep convolutional encoder-decoder architecture for image
segmentation (2017). Every pooling of the encoder keeps where each maximum stood; the decoder puts values back
there and fills the holes by convolutions, so upsampling has no parameters and edges stay where they were.
Bayesian SegNet (Kendall, Badrinarayanan, Cipolla, 2015) adds dropout. Parameter names are those of the Caffe
release.

The release trains with `fastseg.nn.ClassBalancedCrossEntropyLoss` and tests with batch statistics of the
whole training set: ``torch.optim.swa_utils.update_bn(training_images, network)`` computes these.
"""

from torch import nn

from fastseg.models.unpooling import UnpoolingNetwork, VGG16UnpoolingNetwork, initialise_he_
from fastseg.models.vgg import BLOCKS, check_image

# CamVid's classes and their published weights; label 11 (void) is ignored
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_CLASS_WEIGHTS = (
    0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614,
)  # fmt: skip


class SegNet(VGG16UnpoolingNetwork):
    """SegNet: the 13 convolutions of VGG16 and their mirror image.

    Called on an image ``(N, in_channels, H, W)`` of any size it returns class scores
    ``(N, num_classes, H, W)``. Every convolution but the last is followed by batch normalisation and ReLU.
    Keys: ``conv1_1``, ``conv1_1_bn``, ... ``conv5_3``; ``conv5_3_D``, ... ``conv1_1_D``, the scores.

    Args:
        num_classes: classes that are scored; 11 for CamVid.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer; 1 is VGG16.
        dropout: 0.5 is Bayesian SegNet: dropout after poolings 3 to 5 and the decoder stages 5 to 3.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    Convolutions start from He's normal initialisation or, in the encoder, from `load_vgg16`; scales of the
    batch normalisations start at 1, shifts at 0.001.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape ``(N, in_channels, H, W)``.
    """

    def __init__(
        self, num_classes=11, in_channels=3, *, width_multiplier=1.0, dropout=0.0, batch_norm_eps=1e-5
    ):
        super().__init__(num_classes, in_channels, width_multiplier, dropout, batch_norm_eps)
        # each stage ends as wide as the encoder stage above it, the first one with the scores
        ends_with = [num_classes, *(self._width(channels) for _, _, channels in BLOCKS[:-1])]
        for block, layers, block_channels in reversed(BLOCKS):
            channels = self._width(block_channels)
            for index in range(layers, 0, -1):
                name, is_score = f"conv{block}_{index}_D", (block, index) == (1, 1)
                layer = nn.Conv2d(channels, ends_with[block - 1] if index == 1 else channels, 3, padding=1)
                initialise_he_(layer)
                norm = None if is_score else f"{name}_bn"
                self._add_layer(self._decoder[block], name, layer, norm, relu=not is_score)

    def _encoder_norm(self, block, index):
        return f"conv{block}_{index}_bn"


class SegNetBasic(UnpoolingNetwork):
    """SegNet-Basic: four stages of one 7x7 convolution each, and a decoder without nonlinearities.

    Called on an image ``(N, in_channels, H, W)`` of any size it returns class scores
    ``(N, num_classes, H, W)``. Local response normalisation of the image; ``conv1`` ... ``conv4`` with batch
    normalisation and ReLU; ``conv_decode4`` ... ``conv_decode1`` with batch normalisation only;
    ``conv_classifier`` (1x1). The batch normalisations are called ``<convolution>_bn``.

    Args:
        num_classes: classes that are scored; 11 for CamVid.
        in_channels: channels of the image.
        width_multiplier: scales the 64 channels of every layer.
        dropout: 0.5 is the Bayesian version: dropout after poolings 3 and 4 and the decoder stages 4 and 3.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    Initialisation and errors: as `SegNet`.
    """

    stages, channels = 4, 64

    def __init__(
        self, num_classes=11, in_channels=3, *, width_multiplier=1.0, dropout=0.0, batch_norm_eps=1e-5
    ):
        super().__init__(self.stages, num_classes, in_channels, width_multiplier, dropout, batch_norm_eps)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)
        width = self._width(self.channels)
        for stage, layers in self._encoder.items():
            layer = nn.Conv2d(in_channels if stage == 1 else width, width, 7, padding=3)
            self._add_layer(layers, f"conv{stage}", layer, f"conv{stage}_bn")
        for stage, layers in self._decoder.items():
            layer = nn.Conv2d(width, width, 7, padding=3)
            name = f"conv_decode{stage}"
            self._add_layer(layers, name, layer, f"{name}_bn", relu=False)
        self._add_layer(self._decoder[1], "conv_classifier", nn.Conv2d(width, num_classes, 1), relu=False)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                initialise_he_(layer)

    def forward(self, image):
        check_image(self._name, image, self.in_channels)
        return super().forward(self.norm(image))
