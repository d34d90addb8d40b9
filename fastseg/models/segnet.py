"""SegNet on VGG16, SegNet-Basic, and the class weights of the release's training.

Badrinarayanan, Kendall, Cipolla: SegNet, a deep convolutional encoder-decoder architecture for image
segmentation (2017). Every pooling of the encoder keeps the positions of its maxima; the decoder writes values
to these positions and fills the rest by convolutions, so upsampling has no parameters and edges do not move.
Bayesian SegNet (Kendall, Badrinarayanan, Cipolla, 2015) adds dropout. Parameter names are those of the Caffe
release.

The release trains with `fastseg.nn.ClassBalancedCrossEntropyLoss` and tests with batch statistics of the
whole training set: ``torch.optim.swa_utils.update_bn(training_images, network)`` computes these.
"""

from torch import Tensor, nn

from fastseg.models.blocks.convolution import initialise_he_, layer_block, scaled_width
from fastseg.models.blocks.normalisation import LocalResponseNorm
from fastseg.models.blocks.unpooling import UnpoolingNetwork
from fastseg.models.blocks.vgg16 import STAGES, numbered, torchvision_sources, vgg16_stages

# CamVid's classes and their published weights; label 11 (void) is ignored
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_CLASS_WEIGHTS = (
    0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614,
)  # fmt: skip
CHANNELS = 64  # of every layer of SegNet-Basic at width 1


class SegNet(UnpoolingNetwork):
    """SegNet: the 13 convolutions of VGG16 and their mirror image.

    Called on an image ``(N, in_channels, H, W)`` of any size it returns class scores
    ``(N, num_classes, H, W)``. Every convolution but the last is followed by batch normalisation and ReLU.
    Keys: ``conv1_1``, ``conv1_1_bn``, ... ``conv5_3``; ``conv5_3_D``, ... ``conv1_1_D``, the scores.

    Args:
        num_classes: number of classes to score; 11 for CamVid.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer; 1 is VGG16.
        dropout: 0.5 is Bayesian SegNet: dropout after poolings 3 to 5 and the decoder stages 5 to 3.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    Convolutions start from He's normal initialisation or, in the encoder, from `load_imagenet`; scales of the
    batch normalisations start at 1, shifts at 0.001.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape ``(N, in_channels, H, W)``.
    """

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        *,
        width_multiplier: float = 1.0,
        dropout: float = 0.0,
        batch_norm_eps: float = 1e-5,
    ):
        super().__init__(num_classes, in_channels, width_multiplier, batch_norm_eps)
        widths = [scaled_width(width, width_multiplier) for _, width in STAGES]
        decoder = [  # each stage ends with the width of the next finer encoder stage, the finest with the scores
            self._decoder_stage(layers, width, above, scores=stage == 0)
            for stage, ((layers, _), width, above) in enumerate(zip(STAGES, widths, [num_classes, *widths]))
        ]
        encoder = vgg16_stages(in_channels, width_multiplier, norm=self.batch_norm)
        self.build([*encoder], decoder[::-1], dropout=dropout)

    def _decoder_stage(self, layers: int, width: int, last_width: int, scores: bool) -> nn.Sequential:
        stage = nn.Sequential()
        for number in range(layers, 0, -1):
            last = number == 1
            layer = initialise_he_(nn.Conv2d(width, last_width if last else width, 3, padding=1))
            ends = scores and last
            stage.append(layer_block(layer, norm=None if ends else self.batch_norm(layer.out_channels), relu=not ends))
        return stage

    def release_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for stage, layer in numbered():
            place = STAGES[stage - 1][0] - layer  # the decoder's layers are in reverse order
            for path, name in (
                (f"encoder.{stage - 1}.layers.{layer - 1}", f"conv{stage}_{layer}"),
                (f"decoder.{len(STAGES) - stage}.layers.{place}", f"conv{stage}_{layer}_D"),
            ):
                names |= {f"{path}.layer": name, f"{path}.norm": f"{name}_bn"}
        return names

    def load_imagenet(self, state_dict: dict[str, Tensor]) -> "SegNet":
        """Copies the weights of torchvision's ``vgg16`` or ``vgg16_bn`` into the encoder.

        `vgg16` has no batch normalisation: that of this network then does not change. ``classifier`` is ignored.
        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        layers = {f"conv{stage}_{layer}": f"conv{stage}_{layer}_bn" for stage, layer in numbered()}
        self.copy_tensors("load_imagenet", state_dict, torchvision_sources(state_dict, layers))
        return self


class SegNetBasic(UnpoolingNetwork):
    """SegNet-Basic: four stages of one 7x7 convolution each, and a decoder without nonlinearities.

    Called on an image ``(N, in_channels, H, W)`` of any size it returns class scores
    ``(N, num_classes, H, W)``. Local response normalisation of the image; ``conv1`` ... ``conv4`` with batch
    normalisation and ReLU; ``conv_decode4`` ... ``conv_decode1`` with batch normalisation only;
    ``conv_classifier`` (1x1). The batch normalisations are called ``<convolution>_bn``.

    Args:
        num_classes: number of classes to score; 11 for CamVid.
        in_channels: channels of the image.
        width_multiplier: scales the 64 channels of every layer.
        dropout: 0.5 is the Bayesian version: dropout after poolings 3 and 4 and the decoder stages 4 and 3.
        batch_norm_eps: of the variances; Caffe's release uses 1e-9.

    Initialisation and errors: as in `SegNet`.
    """

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        *,
        width_multiplier: float = 1.0,
        dropout: float = 0.0,
        batch_norm_eps: float = 1e-5,
    ):
        super().__init__(num_classes, in_channels, width_multiplier, batch_norm_eps)
        self.norm = LocalResponseNorm()
        width = scaled_width(CHANNELS, width_multiplier)

        def stage(channels, relu):
            layer = initialise_he_(nn.Conv2d(channels, width, 7, padding=3))
            return layer_block(layer, norm=self.batch_norm(width), relu=relu)

        self.build(
            [stage(channels, relu=True) for channels in (in_channels, width, width, width)],
            [stage(width, relu=False) for _ in range(4)],
            dropout=dropout,
        )
        self.conv_classifier = initialise_he_(nn.Conv2d(width, num_classes, 1))

    def release_names(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for stage in range(4):
            for path, name in (("encoder", f"conv{stage + 1}"), ("decoder", f"conv_decode{4 - stage}")):
                names |= {f"{path}.{stage}.layers.layer": name, f"{path}.{stage}.layers.norm": f"{name}_bn"}
        return names

    def forward(self, image: Tensor) -> Tensor:
        self.check_image(image)
        return self.conv_classifier(super().forward(self.norm(image)))
