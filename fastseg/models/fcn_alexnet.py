"""FCN-32s on AlexNet, as in the Caffe release of FCN."""

from torch import Tensor

from fastseg.models.blocks.alexnet import AlexNet
from fastseg.models.blocks.heads import score_layer
from fastseg.models.blocks.upsampling import upsampled, upsampling_layer
from fastseg.models.blocks.vgg16 import FC6, FULLY_CONNECTED_CHANNELS, FullyConnected
from fastseg.models.network import Network

UPSAMPLING = ("fixed", "learned")
OFFSET = 18  # of the image in the upsampled scores


class FCN32sAlexNet(Network):
    """FCN-32s on Caffe's AlexNet, called on (N, in_channels, H, W): class scores (N, num_classes, H, W).

    As in the release the image is padded by 100, and the scores are cropped after the upsampling. Keys: ``conv1`` to
    ``conv5``, ``fc6``, ``fc7``, ``score_fr``, ``upscore``. torchvision's ``alexnet`` is another network and does not
    fit; there is no `load_imagenet`.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        upsampling: "fixed" (bilinear transposed convolution that is not trained) or "learned" (trained).
        width_multiplier: scales the width of every trunk layer.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.

    Scores start at zero, the transposed convolution bilinear, the trunk from He's normal initialisation.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        upsampling: str = "fixed",
        width_multiplier: float = 1.0,
        dropout: float = 0.5,
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(UPSAMPLING, upsampling=upsampling)
        self.trunk = AlexNet(in_channels, width_multiplier, first_padding=100)
        fc6 = FC6(FULLY_CONNECTED_CHANNELS, 6, padding=0)
        self.fully_connected = FullyConnected(self.trunk.channels, width_multiplier, fc6, dropout)
        self.score_fr = score_layer(self.fully_connected.channels, num_classes, deviation=0.0)
        self.upscore = upsampling_layer(num_classes, 32, 0, upsampling, kernel_size=63)

    def release_names(self) -> dict[str, str]:
        names = {f"trunk.{name}": name for name, _ in self.trunk.named_children()}
        return names | {f"fully_connected.{name}": name for name in ("fc6", "fc7")}

    def coarse_scores(self, image: Tensor) -> Tensor:
        """The scores before the upsampling; they begin outside the image."""
        self.check_image(image)
        return self.score_fr(self.fully_connected(self.trunk(image)))

    def forward(self, image: Tensor) -> Tensor:
        return upsampled(self.upscore, self.coarse_scores(image), (OFFSET, OFFSET), image.shape[2:])
