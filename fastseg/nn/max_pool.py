"""`MaxPool2d` and `MaxUnpool2d`, drop-ins for torch's."""

import torch
from torch import nn

from fastseg import _private_api as private
from fastseg import ops
from fastseg.nn._drop_in import drop_in

_INDEX_FORMATS = ("flat", "compact", "auto")
_MAX_COMPACT_TAPS = 255


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _why_flat(pool):
    """The reason why an index of this pooling does not fit in one byte, or None."""
    kernel = _pair(pool.kernel_size)
    if kernel[0] * kernel[-1] > _MAX_COMPACT_TAPS:
        return f"its window has more than {_MAX_COMPACT_TAPS} taps"
    if any(dilation != 1 for dilation in _pair(pool.dilation)):
        return "its windows are dilated, and may contain no pixel"
    return None


def _note(pool):
    if not pool.return_indices:
        return None
    reason = _why_flat(pool)
    return "compact indices" if reason is None else f"int64 indices: {reason}"


def _in_a_graph():
    """True if the result of this call may become part of a graph, or is used in a transform of torch.func."""
    return torch.compiler.is_compiling() or private.in_dispatch_mode() or private.in_functional_transform()


@drop_in(nn.MaxPool2d, note=_note)
class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` through `fastseg.ops.max_pool2d`, where shapes and errors are documented.

    Arguments and attributes are those of the stock class, and also:

    Args:
        index_format: "flat", torch's int64 indices, or "compact", `fastseg.ops.PoolIndices` of one byte per
            element. "auto", which `fastseg.accelerate` uses, is "flat" for windows of more than 255 taps, for
            dilated windows, in graphs of torch.compile and torch.export and in transforms of torch.func; else
            "compact". It matters with ``return_indices`` only.
    """

    index_format = "auto"  # for stock modules whose class `fastseg.accelerate` changed

    def __init__(
        self,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        return_indices=False,
        ceil_mode=False,
        *,
        index_format="flat",
    ):
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        if index_format not in _INDEX_FORMATS:
            allowed = ", ".join(map(repr, _INDEX_FORMATS))
            raise ValueError(f"fastseg.nn.MaxPool2d: index_format={index_format!r}; allowed: {allowed}")
        self.index_format = index_format

    def forward(self, input):
        index_format = self.index_format
        if index_format == "auto":
            compact = self.return_indices and not _in_a_graph() and _why_flat(self) is None
            index_format = "compact" if compact else "flat"
        return ops.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            bool(self.return_indices),  # the stock module takes any truth value
            index_format=index_format,
        )


@drop_in(nn.MaxUnpool2d)
class MaxUnpool2d(nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` through `fastseg.ops.max_unpool2d`, where shapes and errors are documented.

    ``forward`` takes int64 indices or `fastseg.ops.PoolIndices`; the size of the output follows torch's rule for both.
    """

    def forward(self, input, indices, output_size=None):
        return ops.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)
