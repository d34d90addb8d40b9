"""VGG16 (configuration D of Simonyan and Zisserman, 2015) with its fully connected layers as convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

# (block, number of 3x3 convolutions, output channels at width 1)
BLOCKS = ((1, 2, 64), (2, 2, 128), (3, 3, 256), (4, 3, 512), (5, 3, 512))
FULLY_CONNECTED_CHANNELS = 4096


def scaled_width(channels, multiplier):
    """Channels of a layer that has ``channels`` at width 1: rounded, at least 1."""
    return max(1, round(channels * multiplier))


def check_image(name, image, in_channels, smallest=1):
    """RuntimeError unless ``image`` is ``(N, in_channels, H, W)`` with H and W at least ``smallest``."""
    if image.dim() != 4 or image.shape[1] != in_channels or min(image.shape[2:]) < smallest:
        raise RuntimeError(
            f"{name}: image has shape {tuple(image.shape)}; "
            f"allowed: (N, {in_channels}, H, W) with H and W at least {smallest}"
        )


def torchvision_keys(batch_norm=False):
    """torchvision's key of each layer: ``{"conv1_1": "features.0", ..., "fc6": "classifier.0", ...}``.

    Each convolution is followed by a ReLU, in ``vgg16_bn`` by a BatchNorm2d (at the next index) and a ReLU.
    ``classifier.6``, the 1000-way ImageNet output, is left out: it has no counterpart here.
    """
    keys, index = {}, 0
    for block, layers, _ in BLOCKS:
        for layer in range(1, layers + 1):
            keys[f"conv{block}_{layer}"] = f"features.{index}"
            index += 3 if batch_norm else 2
        index += 1  # the pooling
    return keys | {"fc6": "classifier.0", "fc7": "classifier.3"}


@torch.no_grad()
def copy_tensors(model, method, state_dict, sources):
    """Copy ``state_dict[source]`` into ``model`` as ``target`` for each ``target: source``: all or none.

    A linear layer over a flattened ``(C, k, k)`` map is the convolution with its weight viewed as
    ``(O, C, k, k)``, so a matrix ``(O, C k k)`` is accepted for such a weight; nothing is transposed.

    Raises:
        RuntimeError: a key is missing or a tensor has the wrong shape; ``method`` is named as who refuses.
    """
    missing = sorted(source for source in sources.values() if source not in state_dict)
    if missing:
        raise RuntimeError(f"{method}: state_dict lacks {', '.join(missing)}")
    own = model.state_dict(keep_vars=True)
    for target, source in sources.items():
        shape = own[target].shape
        allowed = [tuple(shape)]
        if target in ("fc6.weight", "fc7.weight"):
            allowed.append((shape[0], shape[1:].numel()))
        if tuple(state_dict[source].shape) not in allowed:
            raise RuntimeError(
                f"{method}: {source} has shape {tuple(state_dict[source].shape)}; "
                f"allowed for {target}: {' or '.join(map(str, allowed))}"
            )
    for target, source in sources.items():
        own[target].copy_(state_dict[source].reshape(own[target].shape))


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
            return scaled_width(channels, width_multiplier)

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
        check_image(self._name, image, self.in_channels)
        pooled = {}
        for block, layers, _ in BLOCKS:
            for index in range(1, layers + 1):
                image = F.relu(self.get_submodule(f"conv{block}_{index}")(image), inplace=True)
            image = pooled[block] = self.get_submodule(f"pool{block}")(image)
        fc6 = self.drop6(F.relu(self.fc6(image), inplace=True))
        fc7 = self.drop7(F.relu(self.fc7(fc6), inplace=True))
        return pooled[3], pooled[4], fc7

    def load_vgg16(self, state_dict):
        """Copy the weights of torchvision's ``vgg16`` (``features.N`` and ``classifier.N``) into this trunk.

        The fully connected layers become convolutions; the ImageNet output ``classifier.6`` is ignored.
        torchvision's weights expect RGB images in [0, 1], normalised by the ImageNet mean and deviation.

        Raises:
            RuntimeError: a key is missing or a tensor has the wrong shape; nothing is copied then.
        """
        sources = {
            f"{layer}.{kind}": f"{key}.{kind}"
            for layer, key in torchvision_keys().items()
            for kind in ("weight", "bias")
        }
        copy_tensors(self, f"{self._name}.load_vgg16", state_dict, sources)
        return self
