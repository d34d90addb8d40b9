"""FPN, the semantic branch of Panoptic FPN and the merge to one panoptic map, without a line of fastseg.models.

Keys are detectron2's.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.stock_resnet import BLOCKS


class StockNormed(nn.Conv2d):
    """A convolution without bias whose normalisation is its own ``norm``."""

    def __init__(self, channels_in, channels_out, kernel, stride=1, groups=None, norm=nn.BatchNorm2d):
        super().__init__(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, channels_out) if groups else norm(channels_out)

    def forward(self, image):
        return self.norm(super().forward(image))


class StockBlock(nn.Module):
    """Bottleneck of the ResNet, with the stride in the first 1x1 or in the 3x3."""

    def __init__(self, channels_in, middle, channels_out, stride, projected, stride_in, norm):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.projected = projected
        if projected:
            self.shortcut = StockNormed(channels_in, channels_out, 1, stride, norm=norm)
        self.conv1 = StockNormed(channels_in, middle, 1, first, norm=norm)
        self.conv2 = StockNormed(middle, middle, 3, second, norm=norm)
        self.conv3 = StockNormed(middle, channels_out, 1, norm=norm)

    def forward(self, image):
        residual = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(image)))))
        return torch.relu(residual + (self.shortcut(image) if self.projected else image))


class StockBottomUp(nn.Module):
    """ResNet under the keys ``stem.conv1`` and ``res{2..5}.{i}``; gives its four stages."""

    def __init__(self, depth, width, in_channels, stride_in, norm):
        super().__init__()
        channels = int(64 * width)
        self.stem = nn.ModuleDict({"conv1": StockNormed(in_channels, channels, 7, 2, norm=norm)})
        for stage, count in enumerate(BLOCKS.get(depth, depth)):
            middle, leaving = int(64 * 2**stage * width), int(256 * 2**stage * width)
            blocks = []
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(StockBlock(channels, middle, leaving, stride, block == 0, stride_in, norm))
                channels = leaving
            self.add_module(f"res{stage + 2}", nn.Sequential(*blocks))

    def forward(self, image):
        image = F.max_pool2d(torch.relu(self.stem["conv1"](image)), 3, 2, 1)
        outputs = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            image = stage(image)
            outputs.append(image)
        return outputs


class StockFPN(nn.Module):
    """``forward`` gives [P2, P3, P4, P5] and, with p6=True, P6. The image's sides are multiples of 32."""

    def __init__(
        self, width=1.0, depth=101, in_channels=3, channels=256, stride_in="1x1", p6=False, norm=nn.BatchNorm2d
    ):
        super().__init__()
        for level in range(2, 6):
            self.add_module(f"fpn_lateral{level}", nn.Conv2d(int(64 * 2**level * width), channels, 1))
            self.add_module(f"fpn_output{level}", nn.Conv2d(channels, channels, 3, padding=1))
        self.bottom_up = StockBottomUp(depth, width, in_channels, stride_in, norm)
        self.p6 = p6

    def forward(self, image):
        outputs, merged = [], None
        for level, stage in zip((5, 4, 3, 2), reversed(self.bottom_up(image))):
            lateral = self.get_submodule(f"fpn_lateral{level}")(stage)
            merged = lateral if merged is None else lateral + F.interpolate(merged, scale_factor=2, mode="nearest")
            outputs.insert(0, self.get_submodule(f"fpn_output{level}")(merged))
        if self.p6:
            outputs.append(F.max_pool2d(outputs[3], 1, 2))
        return outputs


class StockSemanticBranch(nn.Module):
    """Every level convolved and doubled until stride 4, summed, and scores; ``p5`` has its layers at 0, 2 and 4."""

    def __init__(self, channels_in, channels, classes, groups):
        super().__init__()
        for level in range(2, 6):
            layers, entering = [], channels_in
            for _ in range(max(1, level - 2)):
                layers += [StockNormed(entering, channels, 3, groups=groups), nn.Identity()]
                entering = channels
            self.add_module(f"p{level}", nn.Sequential(*layers))
        self.predictor = nn.Conv2d(channels, classes, 1)

    def forward(self, levels):
        total = 0
        for level, image in zip(range(2, 6), levels):
            for layer in self.get_submodule(f"p{level}")[::2]:
                image = torch.relu(layer(image))
                if level > 2:
                    image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + image
        return self.predictor(total)


class StockSemanticFPN(nn.Module):
    """``scores`` gives them at stride 4, ``forward`` at image size.

    Zeros fill the image to multiples of 32 at its far ends. classes: 19, or 54 for Panoptic FPN's branch.
    head_width: factor of the 256 channels of FPN and the 128 of the branch, else ``width``. groups: of the branch.
    """

    def __init__(
        self, classes=19, width=1.0, depth=101, in_channels=3, head_width=None, groups=32, stride_in="1x1",
        norm=nn.BatchNorm2d,
    ):  # fmt: skip
        super().__init__()
        head = width if head_width is None else head_width
        channels = int(256 * head)
        self.backbone = StockFPN(width, depth, in_channels, channels, stride_in, norm=norm)
        self.sem_seg_head = StockSemanticBranch(channels, int(128 * head), classes, groups)

    def scores(self, image):
        return self.sem_seg_head(self.backbone(image))

    def forward(self, image):
        height, width = image.shape[2:]
        scores = self.scores(F.pad(image, (0, -width % 32, 0, -height % 32)))
        scores = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False)
        return scores[:, :, :height, :width]


def panoptic_merged(masks, scores, classes, labels, least_score=0.5, most_overlap=0.5, least_area=4096):
    """``(map of segment numbers, list of segments)`` from instances and a map of stuff labels, pixel by pixel.

    masks: (n, H, W) of bools. scores, classes: of the n instances. labels: (H, W), where 0 stands for things.
    A segment is a dict of its id, isthing, category and its score (things) or area (stuff). 0 is void.
    """
    height, width = labels.shape
    canvas, segments, number = np.zeros((height, width), dtype=np.int64), [], 1
    for instance in sorted(range(len(masks)), key=lambda place: -scores[place]):
        if scores[instance] < least_score:
            continue
        pixels = [(y, x) for y in range(height) for x in range(width) if masks[instance][y][x]]
        free = [place for place in pixels if canvas[place] == 0]
        if not pixels or (len(pixels) - len(free)) / len(pixels) > most_overlap:
            continue
        for place in free:
            canvas[place] = number
        segments.append(
            {"id": number, "isthing": True, "category": int(classes[instance]), "score": float(scores[instance])}
        )
        number += 1
    for label in sorted({int(label) for label in labels.flatten()} - {0}):
        free = [(y, x) for y in range(height) for x in range(width) if labels[y, x] == label and canvas[y, x] == 0]
        if len(free) < least_area:
            continue
        for place in free:
            canvas[place] = number
        segments.append({"id": number, "isthing": False, "category": label, "area": len(free)})
        number += 1
    return canvas, segments
