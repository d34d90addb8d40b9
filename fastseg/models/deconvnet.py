"""DeconvNet: VGG16, which reduces 224 x 224 pixels to one, and its mirror image of transposed convolutions.

Noh, Hong, Han: Learning deconvolution network for semantic segmentation (2015). Its inputs are object
proposals, resized to 224 x 224; their scores are pasted into the image and merged by their maximum. Parameter
names are those of the Caffe release (there the last layer is called ``seg-score-voc``).
"""

from torch import Tensor, nn

from fastseg.models.blocks.convolution import Layer, initialise_he_, layer_block, scaled_width
from fastseg.models.blocks.unpooling import UnpoolingNetwork
from fastseg.models.blocks.vgg16 import FULLY_CONNECTED_CHANNELS, STAGES, numbered, torchvision_sources, vgg16_stages
from fastseg.nn import ConvTranspose2d

DECODER_DEVIATION = 0.01  # of the initial weights


class DeconvNet(UnpoolingNetwork):
    """DeconvNet: called on ``(N, in_channels, H, W)`` it returns class scores ``(N, num_classes, H, W)``.

    The 7x7 convolution ``fc6`` turns the 7 x 7 map of a 224 x 224 image into one pixel, and ``fc6-deconv``
    reverses this; larger images give larger maps. Training on a single image of 224 x 224 is not possible: a
    batch normalisation cannot normalise a single pixel.

    Every layer but ``seg-score`` is followed by batch normalisation and ReLU. Keys: ``conv1_1`` with
    ``bn1_1``, ... ``fc6`` with ``bnfc6``, ``fc7`` with ``bnfc7``, ``fc6-deconv`` with ``fc6-deconv-bn``,
    ``deconv5_1`` with ``debn5_1``, ..., ``seg-score``. Weights of transposed convolutions are stored as
    ``(in, out, k, k)``.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer; 1 is VGG16.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    The encoder starts from `load_imagenet` (with ``fc6`` and ``fc7``) or else He's normal initialisation, the
    decoder from N(0, 0.01) with zero biases; scales of the batch normalisations start at 1, shifts at 0.001.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape ``(N, in_channels, H, W)`` with H and W at least 193,
            below which fewer than 7 x 7 pixels reach ``fc6``.
    """

    smallest_image = 193

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        width_multiplier: float = 1.0,
        batch_norm_eps: float = 1e-5,
    ):
        super().__init__(num_classes, in_channels, width_multiplier, batch_norm_eps)
        widths = [scaled_width(width, width_multiplier) for _, width in STAGES]
        hidden = scaled_width(FULLY_CONNECTED_CHANNELS, width_multiplier)
        bottom = [
            initialise_he_(nn.Conv2d(widths[-1], hidden, 7)),
            initialise_he_(nn.Conv2d(hidden, hidden, 1)),
            initialise_decoder_(ConvTranspose2d(hidden, widths[-1], 7)),
        ]
        decoder = [  # each stage ends with the width of the next finer encoder stage; the finest keeps its own
            self._decoder_stage(layers, width, above)
            for (layers, _), width, above in zip(STAGES, widths, [widths[0], *widths])
        ]
        self.build(
            [*vgg16_stages(in_channels, width_multiplier, norm=self.batch_norm)],
            decoder[::-1],
            bottom=nn.Sequential(*map(self._normalised, bottom)),
        )
        self.score = initialise_decoder_(nn.Conv2d(widths[0], num_classes, 1))

    def _normalised(self, layer: Layer) -> nn.Sequential:
        return layer_block(layer, norm=self.batch_norm(layer.out_channels))

    def _decoder_stage(self, layers: int, width: int, last_width: int) -> nn.Sequential:
        widths = [width] * (layers - 1) + [last_width]
        return nn.Sequential(
            *[
                self._normalised(initialise_decoder_(ConvTranspose2d(width, channels, 3, padding=1)))
                for channels in widths
            ]
        )

    def release_names(self) -> dict[str, str]:
        names = {"score": "seg-score"}
        for stage, layer in numbered():
            for place, prefix in ((f"encoder.{stage - 1}", ""), (f"decoder.{len(STAGES) - stage}", "de")):
                path, number = f"{place}.layers.{layer - 1}", f"{stage}_{layer}"
                names |= {f"{path}.layer": f"{prefix}conv{number}", f"{path}.norm": f"{prefix}bn{number}"}
        bottom = ("fc6", "bnfc6"), ("fc7", "bnfc7"), ("fc6-deconv", "fc6-deconv-bn")
        for step, (layer_name, norm_name) in enumerate(bottom):
            names |= {f"bottom.{step}.layer": layer_name, f"bottom.{step}.norm": norm_name}
        return names

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "DeconvNet":
        """Copies the weights of torchvision's ``vgg16`` or ``vgg16_bn`` into the encoder, ``fc6`` and ``fc7``.

        `vgg16` has no batch normalisation: that of this network then does not change. ImageNet's output layer,
        ``classifier.6``, is ignored. torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean
        and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        layers = {f"conv{stage}_{layer}": f"bn{stage}_{layer}" for stage, layer in numbered()}
        sources = torchvision_sources(state_dict, layers | {"fc6": None, "fc7": None})
        self.copy_tensors("load_imagenet", state_dict, sources)
        return self

    def forward(self, image: Tensor) -> Tensor:
        return self.score(super().forward(image))


def initialise_decoder_(layer: Layer) -> Layer:
    nn.init.normal_(layer.weight, std=DECODER_DEVIATION)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
