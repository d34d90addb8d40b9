"""U-Net: the original without padding, the padded one with batch normalisation, and a small one for 128x128 images.

Ronneberger, Fischer, Brox: U-Net, convolutional networks for biomedical image segmentation (2015). The decoder joins
the maps of the encoder to its own. `border_weight_map` gives the weights of the pixels in the original's loss.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import ops
from fastseg.models.blocks.convolution import initialise_he_, scaled_width
from fastseg.models.blocks.mirroring import mirrored
from fastseg.models.blocks.normalisation import NORMS, batch_norm
from fastseg.models.network import IGNORED_LABEL, Network
from fastseg.nn import ConvTranspose2d, MaxPool2d, Upsample

WIDTHS = (64, 128, 256, 512, 1024)  # channels of the five levels
AARHUS_WIDTHS = (16, 32, 64, 128, 256)
MARGIN = 92  # pixels that the layers without padding take from each side of an image
SMALLEST_TILE = 188


class UNet(Network):
    """The base class of the networks of this module; a subclass calls `build` with its layers."""

    dice_weight = 0.0  # of the Dice loss, which is added to the cross entropy

    def build(
        self, encoder: Sequence[nn.Module], ups: Sequence[nn.Module], decoder: Sequence[nn.Module], width: int
    ) -> None:
        """Modules from the finest to the deepest level and back; `width`: channels of the last one."""
        self.encoder, self.pool = nn.ModuleList(encoder), MaxPool2d(2)
        self.ups, self.decoder = nn.ModuleList(ups), nn.ModuleList(decoder)
        self.classifier = initialise_he_(nn.Conv2d(width, self.num_classes, 1))

    def scores(self, image: Tensor) -> Tensor:
        """The scores of the whole network."""
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            image = self.encoded(level, block, image)
            skips.append(image)
        image = skips.pop()
        for up, block in zip(self.ups, self.decoder):
            image = block(self.joined(up, image, skips.pop()))
        return self.classifier(image)

    def encoded(self, level: int, block: nn.Module, image: Tensor) -> Tensor:
        return block(self.pool(image) if level else image)

    def joined(self, up: nn.Module, image: Tensor, skip: Tensor) -> Tensor:
        """The enlarged map and the one of the encoder, in consecutive channels."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        self.check_image(image)
        return self.scores(image)

    def loss(self, images: Tensor, targets: Tensor, **options) -> Tensor:
        """Cross entropy of the scores, for one class of their sigmoid; `UNetSame` adds the Dice loss.

        Args:
            images: (N, in_channels, H, W).
            targets: labels (N, H, W) in int64, int32 or uint8, 0 and 1 for one class; 255 is ignored.
            options: those of `fastseg.ops.cross_entropy`, such as pixel_weight (see `border_weight_map`); of
                `fastseg.ops.cross_entropy_dice` with the Dice loss; for one class of
                `fastseg.ops.binary_cross_entropy_dice`.
        """
        options = {"ignore_index": IGNORED_LABEL, **options}
        dice = {"dice_weight": self.dice_weight, "squared": False}
        if self.num_classes == 1:
            return ops.binary_cross_entropy_dice(self(images)[:, 0], targets, **{**dice, **options})
        if self.dice_weight:
            return ops.cross_entropy_dice(self(images), targets, **{**dice, **options})
        return super().loss(images, targets, **options)

    @torch.no_grad()
    def predict(self, images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        """The label of the highest score at each pixel; for one class 1 where its sigmoid is above a half."""
        return (self(images)[:, 0] > 0).to(dtype) if self.num_classes == 1 else super().predict(images, dtype)


class UNetValid(UNet):
    """The original U-Net, called on an image (N, in_channels, H, W): class scores (N, num_classes, H, W).

    No layer is padded. The image is mirrored at its borders, by 92 pixels and what is missing to a size that fits;
    `tile_scores` takes tiles as they are. `loss` takes ``pixel_weight``, see `border_weight_map`.

    Args:
        num_classes: classes, background included.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element after the two deepest levels of the encoder.

    Convolutions start from He's normal initialisation.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W).
    """

    def __init__(
        self, num_classes: int = 2, in_channels: int = 1, *, width_multiplier: float = 1.0, dropout: float = 0.5
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        widths = [scaled_width(width, width_multiplier) for width in WIDTHS]
        self.dropout, block = nn.Dropout(dropout), partial(_convolved_twice, padding=0)
        self.build(
            [block(entering, width, width) for entering, width in zip([in_channels, *widths], widths)],
            [_enlarging(deep, shallow, 2) for deep, shallow in _upwards(widths)],
            [block(2 * shallow, shallow, shallow) for _, shallow in _upwards(widths)],
            widths[0],
        )

    def encoded(self, level: int, block: nn.Module, image: Tensor) -> Tensor:
        image = super().encoded(level, block, image)
        return self.dropout(image) if level >= len(WIDTHS) - 2 else image

    def joined(self, up: nn.Module, image: Tensor, skip: Tensor) -> Tensor:
        image = up(image)
        (height, width), (full_height, full_width) = image.shape[2:], skip.shape[2:]
        top, left = (full_height - height) // 2, (full_width - width) // 2
        return torch.cat([skip[:, :, top : top + height, left : left + width], image], 1)

    def tile_scores(self, tile: Tensor) -> Tensor:
        """The scores of the middle of a tile: 92 pixels less on each side, 388 of 572.

        Raises:
            RuntimeError: height or width is not 12 more than a multiple of 16, or is below 188.
        """
        self.check_image(tile)
        if min(tile.shape[2:]) < SMALLEST_TILE or any(size % 16 != 12 for size in tile.shape[2:]):
            raise RuntimeError(
                f"{self.name}: tile has shape {tuple(tile.shape)}; "
                f"allowed: (N, {self.in_channels}, H, W) with H and W of {SMALLEST_TILE} + 16 k"
            )
        return self.scores(tile)

    def forward(self, image: Tensor) -> Tensor:
        self.check_image(image)
        height, width = image.shape[2:]
        below, right = (MARGIN + (12 - size - 2 * MARGIN) % 16 for size in (height, width))
        return self.tile_scores(mirrored(image, (MARGIN, below), (MARGIN, right)))[:, :, :height, :width]


class UNetSame(UNet):
    """U-Net with padding and batch normalisation, called on (N, in_channels, H, W): scores (N, num_classes, H, W).

    The keys are those of milesial's Pytorch-UNet: ``inc``, ``down1`` to ``down4``, ``up1`` to ``up4``, ``outc``. `loss`
    is cross entropy plus the mean over the classes of the Dice loss with linear denominators; with one class, both
    are those of its sigmoid.

    Args:
        num_classes: classes, background included; 1 for the foreground alone.
        in_channels: channels of the image.
        bilinear: the decoder enlarges by bilinear interpolation instead of transposed convolutions, and is narrower.
        width_multiplier: scales the width of every layer.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W) with H and W at least 16.
    """

    smallest_image = 16
    dice_weight = 1.0

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 3,
        *,
        bilinear: bool = False,
        width_multiplier: float = 1.0,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(NORMS, norm=norm)
        widths = [scaled_width(width, width_multiplier) for width in WIDTHS]
        block = partial(_convolved_twice, padding=1, norm=batch_norm(norm))
        ups: list[nn.Module]
        if bilinear:
            widths[4] = widths[3]
            ups = [Upsample(scale_factor=2, mode="bilinear", align_corners=True) for _ in widths[1:]]
            leaving = [*widths[2::-1], widths[0]]
        else:
            ups = [_enlarging(deep, shallow, 2) for deep, shallow in _upwards(widths)]
            leaving = widths[3::-1]
        self.build(
            [block(entering, width, width) for entering, width in zip([in_channels, *widths], widths)],
            ups,
            [block(2 * skip, skip, out) for skip, out in zip(widths[3::-1], leaving)],
            widths[0],
        )

    def release_names(self) -> dict[str, str]:
        names = {"classifier": "outc.conv"}
        for level, block in enumerate(self.encoder):
            place = f"down{level}.maxpool_conv.1" if level else "inc"
            names |= _layer_names(f"encoder.{level}", block, f"{place}.double_conv")
        for level, block in enumerate(self.decoder):
            names |= {f"ups.{level}": f"up{level + 1}.up"}
            names |= _layer_names(f"decoder.{level}", block, f"up{level + 1}.conv.double_conv")
        return names

    def joined(self, up: nn.Module, image: Tensor, skip: Tensor) -> Tensor:
        image = up(image)
        missing = [skip.shape[axis] - image.shape[axis] for axis in (3, 2)]  # where pooling left out an odd last row
        return torch.cat([skip, F.pad(image, (0, missing[0], 0, missing[1]))], 1)


class UNetAarhus(UNet):
    """The small U-Net of a lecture of Aarhus University, made for 128x128 pixels and one class.

    Called on an image (N, in_channels, H, W) it returns scores (N, num_classes, H, W); for one class their sigmoid is
    the probability of the foreground, and `loss` is the binary cross entropy. Transposed convolutions keep the first
    rows and columns, as Keras does: weights of Keras fit after transposition to (in, out, k, k). Keys: ``c1`` to
    ``c5``, ``u6``, ``c6``, ... ``u9``, ``c9``, ``out``.

    Args:
        num_classes: 1 for the foreground alone, or classes, background included.
        in_channels: channels of the image.
        width_multiplier: scales the width of every layer.
        dropout: probability of zeroing an element after each pooling and each joining of maps.
        norm: "batch", "sync" (statistics over all processes) or "frozen" (neither statistics nor scales are trained).

    Convolutions start from He's normal initialisation.

    Raises:
        ValueError: a constructor argument is out of its range.
        RuntimeError: the image does not have shape (N, in_channels, H, W) with H and W at least 16.
    """

    smallest_image = 16

    def __init__(
        self,
        num_classes: int = 1,
        in_channels: int = 3,
        *,
        width_multiplier: float = 1.0,
        dropout: float = 0.0,
        norm: str = "batch",
    ):
        super().__init__(num_classes, in_channels)
        self.check_positive(width_multiplier=width_multiplier)
        self.check_one_of(NORMS, norm=norm)
        widths = [scaled_width(width, width_multiplier) for width in AARHUS_WIDTHS]
        block = partial(_convolved_twice, padding=1, norm=batch_norm(norm), bias=True)
        self.dropout = nn.Dropout(dropout)
        self.build(
            [block(entering, width, width) for entering, width in zip([in_channels, *widths], widths)],
            [_enlarging(deep, shallow, 3) for deep, shallow in _upwards(widths)],
            [block(2 * shallow, shallow, shallow) for _, shallow in _upwards(widths)],
            widths[0],
        )

    def release_names(self) -> dict[str, str]:
        names = {"classifier": "out"}
        for level, block in enumerate(self.encoder):
            names |= _layer_names(f"encoder.{level}", block, f"c{level + 1}")
        for level, block in enumerate(self.decoder):
            names |= {f"ups.{level}": f"u{level + 6}"} | _layer_names(f"decoder.{level}", block, f"c{level + 6}")
        return names

    def encoded(self, level: int, block: nn.Module, image: Tensor) -> Tensor:
        return block(self.dropout(self.pool(image)) if level else image)

    def joined(self, up: nn.Module, image: Tensor, skip: Tensor) -> Tensor:
        return self.dropout(torch.cat([up(image, crop=(0, 0, *skip.shape[2:])), skip], 1))


def _upwards(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(channels of a level, of the next finer one), from the deepest level on."""
    return list(zip(widths[:0:-1], widths[-2::-1]))


def _convolved_twice(
    in_channels: int, channels: int, out_channels: int, *, padding: int, bias=None, norm=None
) -> nn.Sequential:
    """Two 3x3 convolutions, each with its normalisation and ReLU. bias: by default where there is no normalisation."""
    bias, layers = norm is None if bias is None else bias, nn.Sequential()
    for entering, leaving in ((in_channels, channels), (channels, out_channels)):
        layers.append(initialise_he_(nn.Conv2d(entering, leaving, 3, padding=padding, bias=bias)))
        if norm is not None:
            layers.append(norm(leaving))
        layers.append(nn.ReLU(inplace=True))
    return layers


def _enlarging(in_channels: int, out_channels: int, kernel_size: int) -> ConvTranspose2d:
    layer = ConvTranspose2d(in_channels, out_channels, kernel_size, 2)
    initialise_he_(layer)
    return layer


def _layer_names(path: str, block: nn.Module, release: str) -> dict[str, str]:
    return {f"{path}.{name}": f"{release}.{name}" for name, _ in block.named_children()}


def border_weight_map(
    instances: Tensor, *, border_weight: float = 10.0, sigma: float = 5.0, balance: bool = True
) -> Tensor:
    """The weights of the pixels in U-Net's loss: narrow gaps between cells count most.

        w(x) = w_c(x) + border_weight exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

    with d1 and d2 the distances from x to the nearest and to the second nearest cell. The second term is 0 within cells
    and where there are fewer than two. Compute it once per image; `loss` takes it as ``pixel_weight``.

    Args:
        instances: (H, W) integers: 0 for the background, another number for each cell.
        border_weight: the weight between two cells that almost touch.
        sigma: how fast it falls, in pixels.
        balance: w_c is (number of pixels) / (2 x number of those of its kind, cell or background); else 1.

    Returns:
        (H, W), float32.

    Raises:
        RuntimeError: `instances` is not (H, W).
        ValueError: `sigma` is not above 0.
    """
    name = "fastseg.models.border_weight_map"
    if instances.dim() != 2 or instances.is_floating_point():
        given = f"shape {tuple(instances.shape)} and dtype {instances.dtype}"
        raise RuntimeError(f"{name}: instances has {given}; allowed: (H, W) integers")
    if not sigma > 0:
        raise ValueError(f"{name}: sigma is {sigma}; allowed: above 0")
    background = instances == 0
    weights = torch.ones(instances.shape, device=instances.device)
    if balance:
        for kind in (background, ~background):
            weights[kind] = instances.numel() / (2 * kind.sum().clamp(min=1))
    nearest = torch.full((2, *instances.shape), torch.inf, device=instances.device)
    reach = int(15 * sigma) + 1  # farther away the exponential is 0 in float32
    for cell in instances.unique().tolist():
        if cell:
            distance = _distance(instances == cell, reach)
            nearest = torch.cat([nearest, distance[None]]).sort(0).values[:2]
    gaps = border_weight * torch.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
    return weights + gaps * background


def _distance(mask: Tensor, reach: int) -> Tensor:
    """The distance of each pixel to the nearest one of `mask`; infinite if that is more than `reach` columns off."""
    rows, columns = mask.shape
    row = torch.arange(rows, device=mask.device)[:, None]
    above = torch.where(mask, row, -rows - reach).cummax(0).values
    below = torch.where(mask, row, 2 * rows + reach).flip(0).cummin(0).values.flip(0)
    vertical = torch.minimum(row - above, below - row).float()  # to the nearest pixel of the mask in the same column
    vertical[:, ~mask.any(0)] = torch.inf
    squared = F.pad(vertical**2, (reach, reach), value=torch.inf)
    nearest = vertical**2
    for shift in range(-reach, reach + 1):
        nearest = torch.minimum(nearest, squared[:, reach + shift : reach + shift + columns] + shift**2)
    return nearest.sqrt()
