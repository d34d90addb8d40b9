"""FCN on VGG16 in torch.nn alone, from the paper's description, without code of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

UPSAMPLING_LAYERS = {
    "32s": {"upscore": 32},
    "16s": {"upscore2": 2, "upscore16": 16},
    "8s": {"upscore2": 2, "upscore_pool4": 2, "upscore8": 8},
}
UPSAMPLING_LAYERS["8s at-once"] = UPSAMPLING_LAYERS["8s"]


def vgg16_in_torchvision_layout(width, linear=4096, batch_norm=False):
    """``features`` and ``classifier`` with torchvision's indices, from its documented configuration.

    ``batch_norm``: the layout of ``vgg16_bn``.
    """
    layers, channels = [], 3
    for step in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
        if step == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers.append(nn.Conv2d(channels, int(step * width), 3, padding=1))
            layers += [nn.BatchNorm2d(int(step * width)), nn.ReLU()] if batch_norm else [nn.ReLU()]
            channels = int(step * width)
    hidden = int(linear * width)
    classifier = nn.Sequential(
        nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, 1000),
    )  # fmt: skip
    return nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": classifier})


class Coordinates:
    """The affine map u = scale x + shift from an input pixel x to a layer's coordinate u."""

    def __init__(self, scale=1.0, shift=0.0):
        self.scale, self.shift = scale, shift

    def window(self, kernel, stride=1, padding=0):
        """Through a convolution or pooling: u' = (u + p - (k - 1) / 2) / s."""
        return Coordinates(self.scale / stride, (self.shift + padding - (kernel - 1) / 2) / stride)

    def transposed(self, kernel, stride, padding=0):
        """Through a transposed convolution: u' = u s - p + (k - 1) / 2."""
        return Coordinates(self.scale * stride, self.shift * stride - padding + (kernel - 1) / 2)

    def interpolated(self, stride):
        """Through interpolation with half-pixel centres: u' = (u + 1/2) s - 1/2."""
        return Coordinates(self.scale * stride, (self.shift + 0.5) * stride - 0.5)

    def offset_to(self, other):
        assert self.scale == other.scale
        return self.shift - other.shift


def crop_offsets(network, interpolated=False):
    """Every crop offset of a pad-100 network, from the affine rule, in the order of use."""

    def upsample(point, stride):
        return point.interpolated(stride) if interpolated else point.transposed(2 * stride, stride)

    image = Coordinates()
    point, pools = image.window(3, padding=100), []
    for block in range(5):
        for _ in range([1, 2, 3, 3, 3][block]):  # without conv1_1; 3x3 with padding 1 shifts nothing
            point = point.window(3, padding=1)
        point = point.window(2, stride=2)
        pools.append(point)
    scores, offsets = point.window(7), []
    skips = [pools[3], pools[2]]
    for stride in UPSAMPLING_LAYERS[network].values():
        scores = upsample(scores, stride)
        is_last = stride > 2
        offsets.append(scores.offset_to(image) if is_last else skips.pop(0).offset_to(scores))
    return offsets


class StockFCN(nn.Module):
    """The same networks in torch.nn, layer by layer, with crop offsets from the affine rule."""

    def __init__(self, network, padding, interpolated, classes, width):
        super().__init__()
        self.network, self.padding, self.interpolated = network, padding, interpolated
        backbone = vgg16_in_torchvision_layout(width)
        self.features = backbone["features"]
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        if padding == "pad100":
            self.features[0].padding = (100, 100)
        conv5, hidden = int(512 * width), int(4096 * width)
        self.fc6 = nn.Conv2d(conv5, hidden, 7, padding=3 if padding == "same" else 0)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.score_fr = nn.Conv2d(hidden, classes, 1)
        if network != "32s":
            self.score_pool4 = nn.Conv2d(int(512 * width), classes, 1)
        if network.startswith("8s"):
            self.score_pool3 = nn.Conv2d(int(256 * width), classes, 1)
        if not interpolated:
            for name, stride in UPSAMPLING_LAYERS[network].items():
                inset = stride // 2 if padding == "same" else 0
                layer = nn.ConvTranspose2d(classes, classes, 2 * stride, stride, inset, bias=False)
                self.add_module(name, layer)

    def upsample(self, name, stride, scores):
        if self.interpolated:
            return F.interpolate(scores, scale_factor=stride, mode="bilinear", align_corners=False)
        return self.get_submodule(name)(scores)

    def forward(self, image):
        pools, scores = [], image
        for layer in self.features:
            scores = layer(scores)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(scores)
        scores = self.score_fr(torch.relu(self.fc7(torch.relu(self.fc6(scores)))))
        steps = UPSAMPLING_LAYERS[self.network]
        offsets = crop_offsets(self.network, self.interpolated)
        if self.padding == "same":
            offsets = [0] * len(steps)
        at_once = self.network == "8s at-once"
        for position, (name, stride) in enumerate(steps.items()):
            scores = self.upsample(name, stride, scores)
            offset = int(offsets[position])
            if stride > 2:
                return scores[:, :, offset : offset + image.shape[2], offset : offset + image.shape[3]]
            if position == 0:
                skip = self.score_pool4(pools[3] * 0.01 if at_once else pools[3])
            else:
                skip = self.score_pool3(pools[2] * 0.0001 if at_once else pools[2])
            skip = skip[:, :, offset : offset + scores.shape[2], offset : offset + scores.shape[3]]
            scores = scores[:, :, : skip.shape[2], : skip.shape[3]] + skip
