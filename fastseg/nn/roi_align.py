"""`RoIAlign`, `RoIPool` and `MultiScaleRoIAlign`: torchvision's modules without torchvision."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastseg import ops


class RoIAlign(nn.Module):
    """``torchvision.ops.RoIAlign`` through `fastseg.ops.roi_align`, where shapes and errors are documented."""

    def __init__(self, output_size, spatial_scale: float, sampling_ratio: int, aligned: bool = False):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return ops.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class RoIPool(nn.Module):
    """``torchvision.ops.RoIPool`` through `fastseg.ops.roi_pool`, where shapes and errors are documented."""

    def __init__(self, output_size, spatial_scale: float):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        return ops.roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


class MultiScaleRoIAlign(nn.Module):
    """``torchvision.ops.MultiScaleRoIAlign`` through `fastseg.ops.multiscale_roi_align`, one launch for all levels.

    Args:
        featmap_names: keys of the feature maps in the dict that `forward` takes, at most 5.
        output_size, sampling_ratio: as in `fastseg.ops.roi_align`.
        canonical_scale, canonical_level: as in `fastseg.ops.multiscale_roi_align`.

    ``forward(x, boxes, image_shapes)`` takes the feature maps by name, fine to coarse, a list of boxes (L, 4) for each
    image, and the (height, width) of each image. As in torchvision, the scale of each map is the power of two nearest
    to its height over that of the tallest image. The first call computes it and keeps it in ``scales``; after setting
    that to None the next call computes it again.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale, self.canonical_level = canonical_scale, canonical_level
        self.scales: list[float] | None = None

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        maps = [level for name, level in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(
                f"fastseg.nn.MultiScaleRoIAlign: x has the keys {[*x]}; allowed: some of {[*self.featmap_names]}"
            )
        if self.scales is None:
            if not image_shapes:
                raise ValueError("fastseg.nn.MultiScaleRoIAlign: image_shapes is empty; allowed: one for each image")
            tallest = max(height for height, _ in image_shapes)
            self.scales = [2.0 ** round(math.log2(level.shape[-2] / tallest)) for level in maps]
        return ops.multiscale_roi_align(
            maps, boxes, self.output_size, self.scales, self.sampling_ratio,
            canonical_scale=self.canonical_scale, canonical_level=self.canonical_level,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )
