"""Labels of images by parts: tiles that overlap, and the average over sizes and mirror images.

Neither keeps class scores of the whole image at full size. For both at once, let `tiled` call `multi_scale`:

    tiled(lambda tile: multi_scale(network, tile), images, tile=713, overlap=241)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import ops
from fastseg._layout import image_format
from fastseg.metrics.progress import progress as with_progress
from fastseg.models.blocks.mirroring import mirrored
from fastseg.models.coarse import CoarseNetwork
from fastseg.models.network import Network

LABELS = (torch.uint8, torch.int64)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of PSPNet's and DeepLab's tests
STRIP_VALUES = 1 << 20  # probabilities at full size that `multi_scale` computes at a time; 4 MiB stay in a cache


@torch.no_grad()
def tiled(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: int | tuple[int, int],
    overlap: int | tuple[int, int],
    *,
    dtype: torch.dtype = torch.uint8,
    progress: bool | None = None,
) -> Tensor:
    """The labels of images that are too large for a network, from tiles (Ronneberger, Fischer, Brox: U-Net, 2015).

    Each pixel's label is that of the tile in whose middle it is: half of the overlap is cut off on each side of a tile.
    Beyond the border of the image a tile sees its mirror image. The labels are those of the whole image, except near
    its border, if half of the overlap is at least as far as a label depends on the image, and if ``tile - overlap`` and
    ``overlap / 2`` are multiples of the network's stride.

    Args:
        network: of fastseg.models; or a function that maps a tile to its labels (N, h, w) or class scores
            (N, C, h, w), where one class means foreground above 0. h and w may be smaller than the tile, by the same
            number on each side: ``tiled(unet.tile_scores, images, tile=572, overlap=184)``, as the original U-Net.
        images: (N, in_channels, H, W).
        tile: rows and columns of a tile, one number or two.
        overlap: rows and columns that a tile shares with the next one, one number or two.
        dtype: of the labels, uint8 or int64.
        progress: show the progress on stderr, by tqdm if it is installed; by default if stderr is a terminal.

    Returns:
        labels (N, H, W).

    Raises:
        ValueError: an argument out of its range, or an overlap smaller than what the network cuts off.
        RuntimeError: images without pixels or of other than four dimensions.
    """
    _check_images("tiled", images)
    _check_dtype("tiled", dtype)
    sides, overlaps = _two("tiled", "tile", tile), _two("tiled", "overlap", overlap)
    for side, shared in zip(sides, overlaps):
        if side < 1:
            raise ValueError(f"fastseg.inference.tiled: tile is {tile}; allowed: 1 or more")
        if not 0 <= shared < side:
            raise ValueError(f"fastseg.inference.tiled: overlap is {overlap}; allowed: 0 to {side - 1} for this tile")
    rows, columns = (_Tiles(*lengths) for lengths in zip(images.shape[2:], sides, overlaps))
    large = mirrored(images, (rows.before, rows.after), (columns.before, columns.after))
    labels = images.new_empty(len(images), rows.size, columns.size, dtype=dtype)
    corners = [(top, left) for top in rows.starts for left in columns.starts]
    for top, left in with_progress(corners, "tiles", _shown(progress)):
        window = large[..., top : top + rows.side, left : left + columns.side]
        found = _labels(network, window.contiguous(memory_format=image_format(images)), dtype)
        found = columns.middle(rows.middle(found, 1), 2)
        place = labels[:, top : top + rows.step, left : left + columns.step]
        place.copy_(found[:, : place.shape[1], : place.shape[2]])
    return labels


class _Tiles:
    """Tiles along the rows or the columns of an image: `size` pixels, `side` of a tile, `overlap` of two tiles.

    before, after: pixels added to the image. starts: of the tiles in the image so enlarged, and of the pixels whose
    labels each tile gives, `step` of them, in the image itself.
    """

    def __init__(self, size: int, side: int, overlap: int):
        self.size, self.side, self.step = size, side, side - overlap
        self.starts = range(0, size, self.step)
        self.before = overlap // 2
        self.after = self.starts[-1] + side - self.before - size

    def middle(self, labels: Tensor, axis: int) -> Tensor:
        """What is used of a tile's labels; a network that pads nothing returns the inner part of its tile."""
        length = labels.shape[axis]
        start = self.before - (self.side - length) // 2
        if not 0 <= start <= length - self.step:
            raise ValueError(
                f"fastseg.inference.tiled: overlap is {self.side - self.step}; "
                f"allowed: {self.side - length} or more, since the network returns {length} of {self.side} pixels"
            )
        return labels.narrow(axis, start, self.step)


def _labels(network: Callable[[Tensor], Tensor], window: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(network, Network):
        return network.predict(window, dtype)
    found = network(window)
    _check_result("tiled", found, {3: "labels (N, h, w)", 4: "scores (N, C, h, w)"})
    if found.dim() == 4:
        if found.shape[1] == 1:
            return found[:, 0] > 0
        return cast(Tensor, ops.upsample_argmax(found, found.shape[2:], dtype=dtype))
    return found


@torch.no_grad()
def multi_scale(
    network: nn.Module,
    images: Tensor,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    *,
    dtype: torch.dtype = torch.uint8,
    return_probability: bool = False,
    progress: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The labels of the highest average probability over several sizes of the image and its mirror image.

    Each resized image is scored; the scores are interpolated to the size of the original image, and the probabilities
    (softmax; for one class the sigmoid) are averaged. Of a network that interpolates a coarse grid, only the coarse
    scores are kept. Others return scores of the size of the resized image, and those of all sizes of one image are
    kept: use tiles, see the top of this module, where they are too large. Probabilities are computed strip by strip.

    Images are resized bilinearly, to ``scale * size`` pixels, or for a network that aligns corners to
    ``scale * (size - 1) + 1``, which keeps sizes of the form 8 k + 1.

    Args:
        network: of fastseg.models, or another module that returns class scores (N, C, h, w), in evaluation mode.
        images: (N, in_channels, H, W).
        scales: factors of the size of the image.
        flip: whether the mirror image (left and right exchanged) counts, too.
        dtype: of the labels, uint8 or int64.
        return_probability: also return the average probability of the label; for one class, of the foreground.
        progress: show the progress on stderr, by tqdm if it is installed; by default if stderr is a terminal.

    Returns:
        labels (N, H, W), for one class 1 where its probability is above a half; or labels and probabilities, float32.

    Raises:
        ValueError: no scales, scales that are not above 0, another dtype, or too many classes for it.
        RuntimeError: images without pixels or of other than four dimensions.
    """
    _check_images("multi_scale", images)
    _check_dtype("multi_scale", dtype)
    if not scales or not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"fastseg.inference.multi_scale: scales are {tuple(scales)}; allowed: numbers above 0")
    height, width = images.shape[2:]
    labels = images.new_empty(len(images), height, width, dtype=dtype)
    probabilities = images.new_empty(labels.shape, dtype=torch.float32) if return_probability else None
    for number, maps in enumerate(_scored_images(network, images, scales, flip, _shown(progress))):
        for rows, average in _averages(maps, height, width, _shown(progress)):
            probability, label = _best(average, dtype)
            labels[number, rows] = label
            if probabilities is not None:
                probabilities[number, rows] = probability
    return labels if probabilities is None else (labels, probabilities)


class _Scores:
    """The scores of one size of an image and of its mirror image, and where the image's pixels are on their grid.

    maps: (1 or 2, C, h, w). covered: rows and columns of the resized image that they cover; it is the top left part.
    resized, size: rows and columns of the resized and of the original image.
    """

    def __init__(
        self,
        maps: Tensor,
        covered: Sequence[int],
        resized: Sequence[int],
        size: Sequence[int],
        align_corners: bool,
    ):
        self.maps = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
        self.align_corners, self.width = align_corners, size[1]
        self.rows, self.columns = (
            _positions(*lengths, align_corners, self.maps) for lengths in zip(maps.shape[2:], covered, resized, size)
        )
        self.enlarged = _enlarged(covered[1], resized[1], size[1], align_corners)

    def probabilities(self, rows: slice) -> Tensor:
        """(1 or 2, C, rows, W), those of the mirror image as it is."""
        strip = _interpolated(self.maps, 2, self.rows[rows])
        if self.enlarged is not None:
            shape = (strip.shape[2], self.enlarged)
            strip = ops.upsample_bilinear2d(strip, shape, align_corners=self.align_corners)[..., : self.width]
        else:
            columns = strip.permute(3, 0, 1, 2).contiguous()  # selecting along the first axis copies long runs
            strip = _interpolated(columns, 0, self.columns).permute(1, 2, 3, 0)
        return strip.sigmoid() if strip.shape[1] == 1 else strip.softmax(1)


def _scored_images(
    network: nn.Module, images: Tensor, scales: Sequence[float], flip: bool, shown: bool
) -> Iterator[list[_Scores]]:
    """The scores of all sizes of an image, for one image after the other."""
    maps: list[_Scores] = []
    parts = [(number, scale) for number in range(len(images)) for scale in scales]
    for number, scale in with_progress(parts, "sizes of images", shown):
        maps.append(_scored(network, images[number : number + 1], scale, flip))
        if len(maps) == len(scales):
            yield maps
            maps = []


def _scored(network: nn.Module, image: Tensor, scale: float, flip: bool) -> _Scores:
    size = tuple(image.shape[2:])
    align_corners = isinstance(network, CoarseNetwork) and network.align_corners
    least = getattr(network, "smallest_image", 1)
    resized = tuple(
        max(least, round(scale * (length - 1)) + 1 if align_corners else round(scale * length)) for length in size
    )
    if resized != size:
        image = F.interpolate(image, resized, mode="bilinear", align_corners=align_corners)
    if flip:
        image = torch.cat([image, image.flip(3)])
    if isinstance(network, CoarseNetwork):
        return _Scores(*network.covering_scores(image), resized, size, align_corners)
    scores = network(image)
    _check_result("multi_scale", scores, {4: "scores (N, C, h, w)"})
    return _Scores(scores, resized, resized, size, align_corners)


def _positions(grid: int, covered: int, resized: int, size: int, align_corners: bool, like: Tensor) -> Tensor:
    """Of each of `size` pixels the position between the `grid` points, which cover `covered` of `resized` pixels."""
    pixels = torch.arange(size, dtype=torch.float64, device=like.device)
    if align_corners:
        positions = pixels * ((resized - 1) / max(1, size - 1) * (grid - 1) / max(1, covered - 1))
    else:
        positions = (pixels + 0.5) * (resized / size * grid / covered) - 0.5
    return positions.clamp(0, grid - 1)


def _enlarged(covered: int, resized: int, size: int, align_corners: bool) -> int | None:
    """Columns to which the whole grid is interpolated if the resized image has `size` of them; None if no integer."""
    if align_corners:
        columns, rest = divmod((size - 1) * (covered - 1), resized - 1) if resized > 1 else (0, 1)
        return None if rest else columns + 1
    columns, rest = divmod(size * covered, resized)
    return None if rest else columns


def _interpolated(maps: Tensor, axis: int, positions: Tensor) -> Tensor:
    """The maps at the positions between their rows or columns."""
    first = positions.floor()
    weight = (positions - first).to(maps.dtype).view(-1, *[1] * (maps.dim() - 1 - axis))
    first = first.long()
    second = (first + 1).clamp(max=maps.shape[axis] - 1)
    return torch.lerp(maps.index_select(axis, first), maps.index_select(axis, second), weight)


def _averages(maps: list[_Scores], height: int, width: int, shown: bool) -> Iterator[tuple[slice, Tensor]]:
    """(rows, average probabilities (C, rows, width)) of one image, strip by strip."""
    images, classes = maps[0].maps.shape[:2]
    step = max(1, STRIP_VALUES // (images * classes * width))
    for start in with_progress(range(0, height, step), "strips of the average", shown):
        rows = slice(start, min(height, start + step))
        total = maps[0].probabilities(rows)
        for scores in maps[1:]:
            total += scores.probabilities(rows)
        average = total[0] + total[1].flip(2) if images == 2 else total[0]
        yield rows, average.div_(images * len(maps))


def _best(average: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(probability, label) of each pixel."""
    if len(average) == 1:
        return average[0], average[0] > 0.5
    if dtype == torch.uint8 and len(average) > 256:
        raise ValueError(f"fastseg.inference.multi_scale: dtype is uint8 for {len(average)} classes; allowed: int64")
    return average.max(0)


def _shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


def _check_images(function: str, images: Tensor) -> None:
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise RuntimeError(
            f"fastseg.inference.{function}: images have shape {tuple(images.shape)}; allowed: (N, C, H, W) with pixels"
        )


def _check_result(function: str, result: object, allowed: dict[int, str]) -> None:
    """allowed: {number of dimensions: what it is}."""
    if not isinstance(result, Tensor) or result.dim() not in allowed:
        given = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"fastseg.inference.{function}: network returns {given}; allowed: {' or '.join(allowed.values())}"
        )


def _check_dtype(function: str, dtype: torch.dtype) -> None:
    if dtype not in LABELS:
        raise ValueError(f"fastseg.inference.{function}: dtype is {dtype}; allowed: uint8, int64")


def _two(function: str, name: str, value: int | tuple[int, int]) -> list[int]:
    """One number for both sides, or one each."""
    values = [*value] if isinstance(value, Sequence) else [value, value]
    if len(values) != 2 or not all(isinstance(entry, int) for entry in values):
        raise ValueError(f"fastseg.inference.{function}: {name} is {value!r}; allowed: one integer or two")
    return values
