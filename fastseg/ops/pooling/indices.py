"""`PoolIndices`: where each maximum of a max pooling was, in one byte."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastseg import _check
from fastseg.kernels.max_pool2d import index_formats as reference
from fastseg.ops.pooling.geometry import MOST_COMPACT_TAPS, check_geometry, pair


class PoolIndices:
    """The compact indices that ``fastseg.ops.max_pool2d(..., index_format="compact")`` returns.

    One byte per pooled element, an eighth of torch's int64 index: the offset ``kh * KW + kw`` of the maximum
    in its window. `fastseg.ops.max_unpool2d` takes it in place of int64 indices; `to_flat` gives these. It
    crosses the boundaries of ``torch.compile`` and ``torch.export`` as a pytree: the offsets and the input's
    size are its leaves.

    Attributes:
        offsets: uint8 (N, C, rows, columns) or (C, rows, columns), like the pool's output.
        input_size: (H, W) of the pool's input.
        kernel_size, stride, padding, dilation: of the pool, as pairs for height and width.
    """

    def __init__(
        self,
        offsets: Tensor,
        input_size: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ):
        self.offsets = offsets
        self.input_size = tuple(input_size)
        self.kernel_size = tuple(pair("PoolIndices", "kernel_size", kernel_size))
        self.stride = tuple(pair("PoolIndices", "stride", kernel_size if stride is None else stride))
        self.padding = tuple(pair("PoolIndices", "padding", padding))
        self.dilation = tuple(pair("PoolIndices", "dilation", dilation))
        check_geometry("PoolIndices", *self.geometry)

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """(kernel_size, stride, padding, dilation)."""
        return self.kernel_size, self.stride, self.padding, self.dilation

    @property
    def shape(self) -> torch.Size:
        return self.offsets.shape

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    def to(self, device: torch.device | str) -> "PoolIndices":
        """The same indices on another device."""
        return PoolIndices(self.offsets.to(device), self.input_size, *self.geometry)

    def to_flat(self) -> Tensor:
        """The int64 indices ``y * W + x`` that torch's max pooling returns for the same input."""
        return reference.flat_from_offsets(self.offsets, self.input_size, *self.geometry)

    @classmethod
    def from_flat(
        cls,
        indices: Tensor,
        input_size: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> "PoolIndices":
        """The compact form of torch's int64 indices of a max pooling with this geometry.

        Args:
            indices: int64 (N, C, rows, columns) or (C, rows, columns).
            input_size: (H, W) of the pool's input, or the whole shape of it.
            kernel_size, stride, padding, dilation: of the pool, as `fastseg.ops.max_pool2d` takes them.

        Raises:
            RuntimeError: an index that is not a tap of its window, a kernel of more than 255 taps, another dtype.
        """
        name = "PoolIndices.from_flat"
        _check.tensor(name, "indices", indices)
        _check.dtype(name, "indices", indices, (torch.int64,))
        size = tuple(input_size)[-2:]
        found = cls(indices, size, kernel_size, stride, padding, dilation)
        if found.kernel_size[0] * found.kernel_size[1] > MOST_COMPACT_TAPS:
            raise RuntimeError(
                f"fastseg.ops.{name}: kernel_size={found.kernel_size}; allowed: at most {MOST_COMPACT_TAPS} taps"
            )
        found.offsets, inside = reference.offsets_from_flat(indices, size, *found.geometry)
        if not inside.all():
            wrong = indices[~inside][0].item()
            raise RuntimeError(f"fastseg.ops.{name}: indices holds {wrong}; allowed: the taps of its window")
        return found

    def __repr__(self) -> str:
        names = "input_size", "kernel_size", "stride", "padding", "dilation"
        values = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"PoolIndices(offsets={tuple(self.shape)} uint8 on {self.device}, {values})"


def _flatten(indices: PoolIndices):
    return [indices.offsets, *indices.input_size], indices.geometry


def _unflatten(leaves, geometry) -> PoolIndices:
    offsets, height, width = leaves
    return PoolIndices(offsets, (height, width), *geometry)


pytree.register_pytree_node(
    PoolIndices,
    _flatten,
    _unflatten,
    serialized_type_name="fastseg.ops.PoolIndices",
    to_dumpable_context=lambda geometry: [list(entry) for entry in geometry],
    from_dumpable_context=lambda geometry: tuple(tuple(entry) for entry in geometry),
    flatten_with_keys_fn=lambda indices: (
        [
            (pytree.GetAttrKey(key), leaf)
            for key, leaf in zip(("offsets", "height", "width"), _flatten(indices)[0])
        ],
        indices.geometry,
    ),
)
torch.serialization.add_safe_globals([PoolIndices])  # a tensor and numbers: exported programs hold it as example input
