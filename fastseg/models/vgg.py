"""VGG16 (configuration D of Simonyan and Zisserman, 2015) with its fully connected layers as convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

# (block, number of 3x3 convolutions, output channels at width 1)
BLOCKS = ((1, 2, 64), (2, 2, 128), (3, 3, 256), (4, 3, 512), (5, 3, 512))
FULLY_CONNECTED_CHANNELS = 4096

# torchvision's key of each layer; `classifier.6`, the 1000-way ImageNet output, has no counterpart here
TORCHVISION_KEYS = {
    "conv1_1": "features.0", "conv1_2": "features.2",
    "conv2_1": "features.5", "conv2_2": "features.7",
    "conv3_1": "features.10", "conv3_2": "features.12", "conv3_3": "features.14",
    "conv4_1": "features.17", "conv4_2": "features.19", "conv4_3": "features.21",
    "conv5_1": "features.24", "conv5_2": "features.26", "conv5_3": "features.28",
    "fc6": "classifier.0", "fc7": "classifier.3",
}  # fmt: skip


class VGG16Trunk(nn.Module):
    """The convolutional VGG16 trunk: ``conv1_1`` ... ``conv5_3``, ``fc6`` (7x7) and ``fc7`` (1x1).

    Pooling is 2x2 with ``ceil_mode=True`` as in Caffe. Without loaded weights, convolutions start from He's
    normal initialisation (fan in, ReLU gain) and zero biases.

    Args:
        in_channels: channels of the image.
        width_multiplier: every layer's width is ``round(width * width_multiplier)``, at least 1.
        first_padding: padding of ``conv1_1``.
        fc6_padding: padding of ``fc6``.
        dropout: probability of zeroing an element after ``fc6`` and ``fc7``.
    """

    def __init__(self, in_channels, width_multiplier, first_padding, fc6_padding, dropout):
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"{self._name}: in_channels is {in_channels}; allowed: 1 or more")
        if not width_multiplier > 0:
            raise ValueError(f"{self._name}: width_multiplier is {width_multiplier}; allowed: above 0")
        self.in_channels = in_channels

        def width(channels):
            return max(1, round(channels * width_multiplier))

        channels = in_channels
        for block, layers, block_channels in BLOCKS:
            for index in range(1, layers + 1):
                padding = first_padding if (block, index) == (1, 1) else 1
                layer = nn.Conv2d(channels, width(block_channels), 3, padding=padding)
                self.add_module(f"conv{block}_{index}", layer)
                channels = width(block_channels)
            self.add_module(f"pool{block}", nn.MaxPool2d(2, 2, ceil_mode=True))

        self.pool3_channels, self.pool4_channels = width(BLOCKS[2][2]), width(BLOCKS[3][2])
        self.fc7_channels = width(FULLY_CONNECTED_CHANNELS)
        self.fc6 = nn.Conv2d(channels, self.fc7_channels, 7, padding=fc6_padding)
        self.drop6 = nn.Dropout(dropout)
        self.fc7 = nn.Conv2d(self.fc7_channels, self.fc7_channels, 1)
        self.drop7 = nn.Dropout(dropout)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    @property
    def _name(self):
        return f"fastseg.models.{type(self).__name__}"

    def features(self, image):
        """``(N, in_channels, H, W)`` -> the maps of ``pool3`` (stride 8), ``pool4`` (16) and ``fc7`` (32)."""
        if image.dim() != 4 or image.shape[1] != self.in_channels or min(image.shape[2:]) < 1:
            raise RuntimeError(
                f"{self._name}: image has shape {tuple(image.shape)}; "
                f"allowed: (N, {self.in_channels}, H, W) with H and W at least 1"
            )
        pooled = {}
        for block, layers, _ in BLOCKS:
            for index in range(1, layers + 1):
                image = F.relu(self.get_submodule(f"conv{block}_{index}")(image), inplace=True)
            image = pooled[block] = self.get_submodule(f"pool{block}")(image)
        fc6 = self.drop6(F.relu(self.fc6(image), inplace=True))
        fc7 = self.drop7(F.relu(self.fc7(fc6), inplace=True))
        return pooled[3], pooled[4], fc7

    @torch.no_grad()
    def load_vgg16(self, state_dict):
        """Copy the weights of torchvision's ``vgg16`` (``features.N`` and ``classifier.N``) into this trunk.

        A linear layer over a flattened ``(C, 7, 7)`` map is the 7x7 convolution with its weight viewed as
        ``(O, C, 7, 7)``: nothing is transposed. The ImageNet output ``classifier.6`` is ignored.
        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        sources = {
            f"{layer}.{kind}": f"{key}.{kind}"
            for layer, key in TORCHVISION_KEYS.items()
            for kind in ("weight", "bias")
        }
        missing = sorted(source for source in sources.values() if source not in state_dict)
        if missing:
            raise RuntimeError(f"{self._name}.load_vgg16: state_dict lacks {', '.join(missing)}")
        own = self.state_dict(keep_vars=True)
        for target, source in sources.items():
            shape = own[target].shape
            allowed = [tuple(shape)]
            if target in ("fc6.weight", "fc7.weight"):
                allowed.append((shape[0], shape[1:].numel()))
            if tuple(state_dict[source].shape) not in allowed:
                raise RuntimeError(
                    f"{self._name}.load_vgg16: {source} has shape {tuple(state_dict[source].shape)}; "
                    f"allowed for {target}: {' or '.join(map(str, allowed))}"
                )
        for target, source in sources.items():
            own[target].copy_(state_dict[source].reshape(own[target].shape))
        return self
