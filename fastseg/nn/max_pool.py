"""`MaxPool2d` and `MaxUnpool2d`, drop-ins for torch's, and when `fastseg.accelerate` gives a pair compact indices."""

from torch import nn

from fastseg import ops
from fastseg.accelerate import register, register_refinement
from fastseg.nn import _pool_pairs


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` through `fastseg.ops.max_pool2d`, where shapes and errors are documented.

    Arguments and attributes are those of the stock class, and besides:

    Args:
        index_format: "flat", torch's int64 indices, or "compact", `fastseg.ops.PoolIndices` of one byte per
            element. It matters with ``return_indices`` only.
    """

    index_format = "flat"  # for stock modules whose class `fastseg.accelerate` changed

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
        if index_format not in ("flat", "compact"):
            raise ValueError(f"fastseg.nn.MaxPool2d: index_format={index_format!r}; allowed: 'flat', 'compact'")
        self.index_format = index_format

    def forward(self, input):
        return ops.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
            index_format=self.index_format,
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d`` through `fastseg.ops.max_unpool2d`, where shapes and errors are documented.

    ``forward`` takes int64 indices or `fastseg.ops.PoolIndices`; the size of the output follows torch's rule for both.
    """

    def forward(self, input, indices, output_size=None):
        return ops.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


register(nn.MaxPool2d, MaxPool2d)
register(nn.MaxUnpool2d, MaxUnpool2d)
register_refinement(_pool_pairs.compact_where_safe)
