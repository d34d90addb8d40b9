"""DeconvNet: VGG16 down to a single pixel at 224 x 224, and its mirror image of transposed convolutions.

Noh, Hong, Han: Learning deconvolution network for semantic segmentation (2015). It was made for object
proposals, resized to 224 x 224, whose scores are pasted back and merged by their maximum. Parameter names are
those of the Caffe release (there the last layer is called ``seg-score-voc``).
"""

from torch import nn

from fastseg.models.unpooling import VGG16UnpoolingNetwork, initialise_he_
from fastseg.models.vgg import BLOCKS, FULLY_CONNECTED_CHANNELS
from fastseg.nn import ConvTranspose2d

DECODER_DEVIATION = 0.01  # of the initial weights


class DeconvNet(VGG16UnpoolingNetwork):
    """DeconvNet: called on ``(N, in_channels, H, W)`` it returns class scores ``(N, num_classes, H, W)``.

    The 7x7 convolution ``fc6`` turns the 7 x 7 map of a 224 x 224 image into one pixel, ``fc6-deconv`` turns
    it back; larger images work in the same way, with larger maps. One image of 224 x 224 alone cannot be
    trained on: a batch normalisation has nothing to normalise one pixel by.

    Every layer but ``seg-score`` is followed by batch normalisation and ReLU. Keys: ``conv1_1`` with
    ``bn1_1``, ... ``fc6`` with ``bnfc6``, ``fc7`` with ``bnfc7``, ``fc6-deconv`` with ``fc6-deconv-bn``,
    ``deconv5_1`` with ``debn5_1``, ..., ``seg-score``. Weights of transposed convolutions are stored as
    ``(in, out, k, k)``.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer; 1 is VGG16.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    The encoder starts from `load_vgg16` (with ``fc6`` and ``fc7``) or else He's normal initialisation, the
    decoder from N(0, 0.01) with zero biases; scales of the batch normalisations start at 1, shifts at 0.001.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape ``(N, in_channels, H, W)`` with H and W at least 193,
            below which fewer than 7 x 7 pixels reach ``fc6``.
    """

    smallest_image = 193

    def __init__(self, num_classes=21, in_channels=3, *, width_multiplier=1.0, batch_norm_eps=1e-5):
        super().__init__(num_classes, in_channels, width_multiplier, 0.0, batch_norm_eps)
        self._build_fully_connected()
        # each stage ends as wide as the encoder stage above it; the first one keeps its width
        ends_with = [self._width(channels) for _, _, channels in (BLOCKS[0], *BLOCKS[:-1])]
        for block, layers, block_channels in reversed(BLOCKS):
            channels = self._width(block_channels)
            for index in range(1, layers + 1):
                out_channels = ends_with[block - 1] if index == layers else channels
                layer = ConvTranspose2d(channels, out_channels, 3, padding=1)
                initialise_decoder_(layer)
                self._add_layer(
                    self._decoder[block], f"deconv{block}_{index}", layer, f"debn{block}_{index}"
                )
        score = nn.Conv2d(self._width(BLOCKS[0][2]), num_classes, 1)
        initialise_decoder_(score)
        self._add_layer(self._decoder[1], "seg-score", score, relu=False)

    def _build_fully_connected(self):
        channels, hidden = self._width(BLOCKS[-1][2]), self._width(FULLY_CONNECTED_CHANNELS)
        for name, layer in (
            ("fc6", nn.Conv2d(channels, hidden, 7)),
            ("fc7", nn.Conv2d(hidden, hidden, 1)),
        ):
            initialise_he_(layer)
            self._add_layer(self._bottom, name, layer, f"bn{name}")
        layer = ConvTranspose2d(hidden, channels, 7)
        initialise_decoder_(layer)
        self._add_layer(self._bottom, "fc6-deconv", layer, "fc6-deconv-bn")

    def _encoder_norm(self, block, index):
        return f"bn{block}_{index}"


def initialise_decoder_(layer):
    nn.init.normal_(layer.weight, std=DECODER_DEVIATION)
    nn.init.zeros_(layer.bias)
