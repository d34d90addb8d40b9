"""FCN-32s on GoogLeNet. There is no release; the paper (Long, Shelhamer, Darrell 2015) reports its accuracy."""

import torch.nn.functional as F
from torch import Tensor

from fastseg.models.blocks.googlenet import GoogLeNet
from fastseg.models.blocks.heads import score_layer
from fastseg.models.blocks.upsampling import upsampled, upsampling_layer
from fastseg.models.network import Network

PADDINGS = ("pad100", "same")
UPSAMPLING = ("fixed", "learned")
STRIDE = 32


class FCN32sGoogLeNet(Network):
    """FCN-32s on the original GoogLeNet, called on (N, in_channels, H, W): class scores (N, num_classes, H, W).

    The classifier and the average pooling before it become one score layer. Keys: torchvision's for the trunk
    (``conv1.conv``, ... ``inception5b.branch4.1.conv``), ``score_fr``, ``upscore``. torchvision's file does not fit (it
    has batch normalisation instead of biases, and other kernels); there is no `load_imagenet`.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        padding: "pad100" pads the image by 100 and takes the centre of the upsampled scores; "same" fills it with
            zeros up to multiples of 32, below and to the right.
        upsampling: "fixed" (bilinear transposed convolution that is not trained) or "learned" (trained).
        width_multiplier: scales the width of every trunk layer.

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
        padding: str = "pad100",
        upsampling: str = "fixed",
        width_multiplier: float = 1.0,
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(PADDINGS, padding=padding)
        self.check_one_of(UPSAMPLING, upsampling=upsampling)
        self.padding = padding
        first_padding, inset = (100, 0) if padding == "pad100" else (3, STRIDE // 2)
        self.trunk = GoogLeNet(in_channels, width_multiplier, first_padding=first_padding)
        self.score_fr = score_layer(self.trunk.channels, num_classes, deviation=0.0)
        self.upscore = upsampling_layer(num_classes, STRIDE, inset, upsampling)

    def release_names(self) -> dict[str, str]:
        return self.trunk.torchvision_names("trunk.")

    def coarse_scores(self, image: Tensor) -> Tensor:
        """The scores before the upsampling."""
        self.check_image(image)
        if self.padding == "same":
            below, right = (-size % STRIDE for size in image.shape[2:])
            image = F.pad(image, (0, right, 0, below))
        return self.score_fr(self.trunk(image))

    def forward(self, image: Tensor) -> Tensor:
        scores, offsets = self.coarse_scores(image), (0, 0)
        if self.padding == "pad100":
            top, left = ((STRIDE * (length + 1) - size) // 2 for length, size in zip(scores.shape[2:], image.shape[2:]))
            offsets = top, left
        return upsampled(self.upscore, scores, offsets, image.shape[2:])
