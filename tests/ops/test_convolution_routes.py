"""Which convolutions `auto` runs by stock PyTorch, with the limits that users have."""

import pytest
import torch

from fastseg import _private_api as private
from fastseg import info, ops
from fastseg._backend import BackendError
from fastseg._op import REGISTRY
from fastseg.ops.convolution import routes
from fastseg.ops.convolution.maps import DENSE, DEPTHWISE, UPSAMPLING
from tests.programs import recorded_calls


@pytest.fixture(autouse=True)
def _no_call_is_left_to_stock():
    """Overrides the fixture that sets the limits to 0: these tests need the real ones."""


def chosen(function, *arguments, **named) -> str:
    """The op and the backend that run."""
    text = info.explain(function.__name__, *arguments, **named)
    op, _, backend = text.partition(" runs")[0].removeprefix("fastseg.").partition(": ")
    return f"{op}: {backend}"


def image(channels, size, dtype=torch.float32):
    return torch.zeros(1, channels, size, size, dtype=dtype)


def test_dense_convolutions():
    wide, weight = image(256, 65), torch.zeros(8, 256, 3, 3)
    assert chosen(ops.dilated_conv2d, wide, weight, padding=36, dilation=36) == "dilated_conv2d: cpu"
    assert chosen(ops.dilated_conv2d, wide, weight, padding=2, dilation=2) == "dilated_conv2d: stock"
    assert chosen(ops.dilated_conv2d, wide, weight, padding=1) == "dilated_conv2d: stock"
    assert chosen(ops.dilated_conv2d, image(4, 65), weight[:, :4], padding=36, dilation=36) == "dilated_conv2d: stock"
    # at rate 12 skipping taps in the padding pays with many channels, in channels_last
    assert chosen(ops.dilated_conv2d, wide, weight, padding=12, dilation=12) == "dilated_conv2d: stock"
    very_wide = image(1024, 65), torch.zeros(8, 1024, 3, 3)
    assert chosen(ops.dilated_conv2d, *very_wide, padding=12, dilation=12) == "dilated_conv2d: stock"
    very_wide = very_wide[0].to(memory_format=torch.channels_last), very_wide[1]
    assert chosen(ops.dilated_conv2d, *very_wide, padding=12, dilation=12) == "dilated_conv2d: cpu"


@pytest.mark.parametrize("hardware", (True, False))
def test_half_types_depend_on_the_processor(hardware, monkeypatch):
    monkeypatch.setattr(private, "multiplies_halves", lambda dtype: hardware)
    for dtype in (torch.bfloat16, torch.float16):
        call = image(32, 16, dtype), torch.zeros(8, 32, 3, 3, dtype=dtype)
        assert chosen(ops.dilated_conv2d, *call) == f"dilated_conv2d: {'stock' if hardware else 'cpu'}"


def test_transposed_convolutions():
    few, weight = image(21, 16), torch.ones(21, 21, 16, 16)
    assert chosen(ops.conv_transpose2d, few, weight, stride=8) == "upsampling_conv_transpose2d: cpu"
    last = few.contiguous(memory_format=torch.channels_last)
    assert chosen(ops.conv_transpose2d, last, weight, stride=8) == "conv_transpose2d: stock"
    assert chosen(ops.conv_transpose2d, few, weight[..., :4, :4], stride=2) == "conv_transpose2d: stock"
    many = image(128, 8), torch.ones(128, 8, 16, 16)
    assert chosen(ops.conv_transpose2d, *many, stride=8) == "conv_transpose2d: stock"


def test_depthwise_convolutions():
    call = image(32, 64), torch.ones(32, 1, 3, 3)
    assert chosen(ops.dilated_conv2d, *call, padding=2, dilation=2, groups=32) == "depthwise_dilated_conv2d: cpu"
    assert chosen(ops.dilated_conv2d, image(4, 4), call[1][:4], padding=1, groups=4) == "depthwise_dilated_conv2d: cpu"


def test_on_a_gpu():
    """From predicted times: nothing was measured."""

    def on_gpu(maps, size, weight, padding, dilation, stride=1, transposed=False):
        op = maps.transposed if transposed else maps.forward
        output = 65 if transposed else size
        numbers = None, None, [stride] * 2, [padding] * 2, [dilation] * 2, 1, [output] * 2, False
        return op.stock.on_gpu((image(weight.shape[0 if transposed else 1], size), weight, *numbers))

    weight = torch.zeros(8, 16, 3, 3)
    assert on_gpu(DENSE, 64, weight, 2, 2) and on_gpu(DENSE, 64, weight, 1, 1)
    assert not on_gpu(DENSE, 65, weight, 36, 36) and not on_gpu(DENSE, 65, weight, 24, 24)
    assert on_gpu(DENSE, 33, torch.zeros(16, 8, 2, 2), 0, 1, stride=2, transposed=True)
    assert not on_gpu(DENSE, 9, torch.zeros(16, 8, 16, 16), 4, 1, stride=8, transposed=True)
    for op in (*DEPTHWISE, *UPSAMPLING):
        assert not op.stock.on_gpu(tuple(range(12)))


def test_every_map_has_a_row_for_stock():
    for name in ("dilated_conv2d", "conv_transpose2d", "conv2d_grad_weight"):
        for prefix in ("", "depthwise_", "upsampling_"):
            assert REGISTRY[prefix + name].stock is not None


@pytest.mark.parametrize(
    "numbers", ((65, 65, 3, 1, 36, 36), (10, 4, 3, 3, 1, 1), (7, 9, 2, 1, 5, 4), (5, 3, 3, 2, 1, 1))
)
def test_the_share_of_taps_inside(numbers):
    extent, out_extent, taps, stride, padding, dilation = numbers
    inside = sum(
        0 <= output * stride - padding + tap * dilation < extent for output in range(out_extent) for tap in range(taps)
    )
    assert routes.visited_share(*numbers) == inside / (taps * out_extent)


@pytest.mark.parametrize(
    "rate, channels, dynamic, ours",
    [(2, 256, False, False), (36, 256, False, True), (36, 16, False, False), (2, 256, True, True)],
)
def test_compiled_programs_of_fixed_sizes_leave_to_stock_what_eager_calls_do(rate, channels, dynamic, ours):
    weight = torch.randn(8, channels, 3, 3)

    def convolve(image):
        return ops.dilated_conv2d(image, weight, padding=rate, dilation=rate)

    calls = recorded_calls(convolve, image(channels, 65), dynamic=dynamic)
    assert ("fastseg.dilated_conv2d.default" in calls) is ours


def test_stock_refuses_what_writes_past_its_buffer():
    """Strided 1x1 weights of fewer than 16 channels, in channels_last: torch 2.13 and 2.14 crash in the backward."""
    few = image(8, 64).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(16, 8, 1, 1)
    assert chosen(ops.dilated_conv2d, few, weight, stride=2) == "dilated_conv2d: cpu"
    assert chosen(ops.dilated_conv2d, few, weight) == "dilated_conv2d: stock"
    assert chosen(ops.dilated_conv2d, few.contiguous(), weight, stride=2) == "dilated_conv2d: stock"
    many = image(16, 64).contiguous(memory_format=torch.channels_last)
    assert chosen(ops.dilated_conv2d, many, torch.zeros(16, 16, 1, 1), stride=2) == "dilated_conv2d: stock"
    assert chosen(ops.conv_transpose2d, many, weight, stride=2) == "conv_transpose2d: cpu"
    with pytest.raises(BackendError, match="writes past its buffer"):
        ops.dilated_conv2d(few, weight, stride=2, backend="stock")
    arguments = few, image(16, 32), (2, 2), (0, 0), (1, 1), 1, (1, 1), False
    assert "cpu runs" in DENSE.grad_weight.explain(arguments)
