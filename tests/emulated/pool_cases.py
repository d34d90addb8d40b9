"""Pooling geometries, layouts and inputs for the CUDA kernels of max_pool2d and max_unpool2d."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.uint8)


@dataclass(frozen=True)
class Geometry:
    kernel: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def lists(self):
        return [*self.kernel], [*self.stride], [*self.padding], [*self.dilation]


TILED = Geometry()
TILED_CEIL = Geometry(ceil_mode=True)
OVERLAPPING = Geometry((3, 3), padding=(1, 1))
CASES = [  # (geometry, size of the plane)
    (TILED, (6, 16)),  # whole rows: packs of 16 bytes in every dtype
    (TILED, (7, 12)),  # a row left over, packs of 8 bytes
    (TILED_CEIL, (7, 10)),  # a last row of half windows
    (TILED, (4, 6)),
    (TILED, (7, 9)),  # a column left over too
    (TILED_CEIL, (5, 7)),
    (TILED, (2, 2)),
    (OVERLAPPING, (9, 14)),
    (Geometry((3, 3), padding=(1, 1), ceil_mode=True), (8, 7)),
    (Geometry((3, 3), ceil_mode=True), (6, 8)),
    (Geometry((2, 2), padding=(1, 1)), (7, 8)),
    (Geometry((2, 2), (1, 1)), (6, 5)),
    (Geometry((3, 2), (2, 1), (1, 0), (1, 2)), (8, 9)),
    (Geometry((2, 3), (4, 3)), (9, 10)),  # elements between the windows
    (Geometry((2, 3), (2, 2), (1, 1), (3, 2)), (11, 12)),
    (Geometry((5, 15), (1, 4), (2, 7)), (7, 20)),
    (Geometry((1, 1), (3, 1)), (5, 4)),
    (Geometry((4, 4), (4, 4), (2, 2)), (1, 3)),
]
LAYOUTS = {  # name -> channels
    "contiguous": 3,
    "offset": 2,  # contiguous, but not on a 16-byte boundary
    "channels_last": 8,  # packs of 16 bytes in every dtype
    "channels_last_odd": 5,
}


def arranged(tensor: Tensor, layout: str) -> Tensor:
    """The tensor, (N, C, H, W), in the named layout."""
    if layout.startswith("channels_last"):
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)
    return tensor.contiguous()


def poisoned(shape, dtype: torch.dtype, layout: str) -> Tensor:
    """An output whose elements must all be written: NaN, or an index that no window gives."""
    value = float("nan") if dtype.is_floating_point else 111
    return arranged(torch.full(shape, value, dtype=dtype), layout)


def numbers(shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: many ties, and sums that every dtype holds exactly."""
    return torch.randint(-3, 4, shape).to(dtype)


def special_numbers(shape, dtype: torch.dtype) -> Tensor:
    """The same with NaN and infinities, and one plane of only -inf."""
    values = numbers(shape, dtype)
    values[torch.rand(shape) < 0.05] = float("nan")
    values[torch.rand(shape) < 0.10] = float("-inf")
    values[torch.rand(shape) < 0.05] = float("inf")
    values[:1, :1] = float("-inf")
    return values


def stock_pool(input: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """torch's output and flat indices."""
    options = dict(padding=geometry.padding, dilation=geometry.dilation, ceil_mode=geometry.ceil_mode)
    return F.max_pool2d(input, geometry.kernel, geometry.stride, **options, return_indices=True)


def compact(flat: Tensor, geometry: Geometry, width: int) -> Tensor:
    """uint8 offsets in the windows for flat indices into planes of that width."""
    taps = []
    for axis, position in enumerate((flat // width, flat % width)):
        window = torch.arange(flat.size(2 + axis)).view((-1, 1) if axis == 0 else (1, -1))
        start = window * geometry.stride[axis] - geometry.padding[axis]
        taps.append((position - start) // geometry.dilation[axis])
    return (taps[0] * geometry.kernel[1] + taps[1]).to(torch.uint8)


def indices_of(flat: Tensor, dtype: torch.dtype, geometry: Geometry, width: int) -> Tensor:
    return compact(flat, geometry, width) if dtype == torch.uint8 else flat


def window_indices(shape, geometry: Geometry, size) -> Tensor:
    """Flat indices of random elements of the windows: valid for any input of that size, never repeated by a pool."""
    _, indices = stock_pool(torch.rand(*shape, *size), geometry)
    return indices


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=0, equal_nan=True)
