"""The dilated front-end and context modules in stock torch.nn, without a line of fastseg.models."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.stock_deeplab_vgg import add_vgg16, through_block

MARGIN = 186  # what an unpadded front-end takes off each side
LARGE = (2, 2, 4, 8, 16, 32, 32)  # channels of the large module, as multiples of the classes
# rate of every layer of a context module but the last
CONTEXT = {
    "dilation7": (1, 1, 2, 4, 8, 1),
    "dilation8": (1, 1, 2, 4, 8, 16, 1),
    "dilation10": (1, 1, 2, 4, 8, 16, 32, 64, 1),
}


class StockFrontEnd(nn.Module):
    """VGG16 without its last two poolings, the layers after them at rates 2 and 4; scores at stride 8.

    padding: "valid" (no layer is padded; n pixels give (n - 372) / 8 scores) or "same". Pooling rounds up.
    """

    def __init__(self, classes=21, width=1.0, in_channels=3, padding="valid", dropout=0.5):
        super().__init__()
        same = padding == "same"
        add_vgg16(self, width, in_channels, padding=int(same), conv5_padding=2 * same)
        hidden = int(4096 * width)
        self.fc6 = nn.Conv2d(int(512 * width), hidden, 7, 1, 12 * same, 4)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.final = nn.Conv2d(hidden, classes, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image):
        for block in range(1, 6):
            image = through_block(self, block, image)
            if block < 4:
                image = F.max_pool2d(image, 2, 2, ceil_mode=True)
        image = self.dropout(torch.relu(self.fc6(image)))
        image = self.dropout(torch.relu(self.fc7(image)))
        return self.final(image)


class StockContext(nn.Module):
    """The context module on score maps, whose size it keeps.

    kind: "basic" or "large". padding: "same" pads every layer by its rate; "first" pads the first one by 33 and no
    other. prefix: of the keys ``<prefix>conv1_1``, ``conv1_2``, ``conv2_1`` ... ``fc1``, ``final``.
    """

    def __init__(self, classes=21, kind="basic", rates=CONTEXT["dilation8"], padding="same", prefix="ctx_"):
        super().__init__()
        names = ["conv1_1", "conv1_2", *(f"conv{number}_1" for number in range(2, len(rates) - 1)), "fc1"]
        multiples = LARGE if kind == "large" else (1,) * len(rates)
        assert len(names) == len(rates) == len(multiples)
        total = sum(rates)
        self.names, channels = [prefix + name for name in [*names, "final"]], classes
        for place, (name, rate, multiple) in enumerate(zip(self.names, rates, multiples)):
            inset = rate if padding == "same" else total if place == 0 else 0
            self.add_module(name, nn.Conv2d(channels, multiple * classes, 3, 1, inset, rate))
            channels = multiple * classes
        self.add_module(self.names[-1], nn.Conv2d(channels, classes, 1))
        self.classes = classes

    def forward(self, scores):
        for name in self.names[:-1]:
            scores = torch.relu(self.get_submodule(name)(scores))
        return self.get_submodule(self.names[-1])(scores)


def identity_initialised(context, deviation=0.01, generator=None):
    """``context`` with noise everywhere but in the centres of pairs of channels of the same group, without biases."""
    with torch.no_grad():
        for name in context.names:
            weight, classes = context.get_submodule(name).weight, context.classes
            context.get_submodule(name).bias.zero_()
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
            leaving, entering, kernel = weight.shape[:3]
            for b in range(leaving):
                for a in range(entering):
                    if a * classes // entering == b * classes // leaving:
                        weight[b, a, kernel // 2, kernel // 2] = classes / leaving
    return context


def enlarged(scores, size, stride=8):
    """The value of pixel x lies at x / stride between the scores; beyond the last score it is that score."""

    def along(maps, dim, length):
        place = torch.arange(length, dtype=torch.float64, device=maps.device) / stride
        last = maps.shape[dim] - 1
        left = place.floor().long().clamp(max=last)
        right = (left + 1).clamp(max=last)
        share = (place - left).to(maps.dtype)
        shape = [1, 1, 1, 1]
        shape[dim] = length
        share = share.reshape(shape)
        return maps.index_select(dim, left) * (1 - share) + maps.index_select(dim, right) * share

    return along(along(scores, 2, size[0]), 3, size[1])


class StockDilation(nn.Module):
    """Front-end, context module unless context=None, and scores at image size.

    padding: "valid" reflects the image by 186 pixels on each side (without repeating its border pixels), "same" does
    not. context_padding, rates, prefix: see ``StockContext``. probabilities: softmax before the scores are enlarged.
    upsample: "shifted" (see ``enlarged``) or "transposed": the fixed bilinear transposed convolution of one group per
    class, ``ctx_upsample``.
    """

    def __init__(
        self, classes=21, width=1.0, context=None, in_channels=3, padding="valid", context_padding="same",
        rates=CONTEXT["dilation8"], prefix="ctx_", probabilities=False, upsample="shifted", dropout=0.5,
    ):  # fmt: skip
        super().__init__()
        self.front_end = StockFrontEnd(classes, width, in_channels, padding, dropout)
        self.context = StockContext(classes, context, rates, context_padding, prefix) if context else nn.Identity()
        self.margin = MARGIN if padding == "valid" else 0
        self.probabilities = probabilities
        if upsample == "transposed":
            self.ctx_upsample = nn.ConvTranspose2d(classes, classes, 16, 8, 4, groups=classes, bias=False)
            taps = 1 - (torch.arange(16) - 7.5).abs() / 8
            self.ctx_upsample.weight.data.copy_(taps[:, None] * taps)
            self.ctx_upsample.weight.requires_grad_(False)

    def forward(self, image):
        height, width = image.shape[2:]
        scores = self.context(self.front_end(F.pad(image, [self.margin] * 4, mode="reflect")))
        if hasattr(self, "ctx_upsample"):
            scores = self.ctx_upsample(scores)[:, :, :height, :width]
            return scores.softmax(1) if self.probabilities else scores
        return enlarged(scores.softmax(1) if self.probabilities else scores, (height, width))
