"""The Triton kernels of the convolutions in the interpreter: dense, grouped and depthwise, with all gradients."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.convolution import launch, triton_depthwise, triton_weight
from fastseg.kernels.convolution import triton as dense
from fastseg.ops import convolution
from fastseg.testing import assert_within_policy

HALF = torch.float16, torch.bfloat16
LAYOUTS = torch.contiguous_format, torch.channels_last


def among_nans(tensor):
    """The same tensor, with NaN before and after it in memory: a read out of bounds shows."""
    room = torch.full((tensor.numel() + 64,), float("nan"), dtype=tensor.dtype)
    inner = room[32:-32].as_strided(tensor.shape, tensor.stride(), 32)
    return inner.copy_(tensor)


def tensors(*shapes, dtype=torch.float32, layout=torch.contiguous_format):
    made = [None if shape is None else torch.randn(shape).to(dtype) for shape in shapes]
    images = [value if value is None or value.dim() < 4 else value.contiguous(memory_format=layout) for value in made]
    return [None if value is None else among_nans(value).requires_grad_() for value in images]


def stock_convolution(input, weight, bias, residual, relu, **options):
    output = F.conv2d(input, weight, bias, **options)
    output = output if residual is None else output + residual
    return output.relu() if relu else output


def stock_transposed(input, weight, bias, skip, relu, crop=None, skip_offset=(0, 0), **options):
    output = F.conv_transpose2d(input, weight, bias, **options)
    if crop is not None:
        output = output[:, :, crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]
    if skip is not None:
        output = output + skip[:, :, skip_offset[0] :, skip_offset[1] :][:, :, : output.shape[2], : output.shape[3]]
    return output.relu() if relu else output


def ours_convolution(input, weight, bias, residual, relu, **options):
    activation = "relu" if relu else None
    return convolution.dilated_conv2d(
        input, weight, bias, activation=activation, residual=residual, backend="triton", **options
    )


def ours_transposed(input, weight, bias, skip, relu, **options):
    activation = "relu" if relu else None
    return convolution.conv_transpose2d(
        input, weight, bias, activation=activation, skip=skip, backend="triton", **options
    )


def compare(ours, stock, inputs, relu=False, **options):
    """Output and all gradients, against fp64 and against stock in the same dtype."""
    results = {}
    for name, function, dtype in (("ours", ours, None), ("stock", stock, None), ("exact", stock, torch.float64)):
        own = [None if value is None else value.detach().to(dtype or value.dtype).requires_grad_() for value in inputs]
        output = function(*own, relu, **options)
        if not results:
            grad = torch.randn(output.shape).to(output.dtype)
        given = [value for value in own if value is not None]
        results[name] = [output, *torch.autograd.grad(output, given, grad.to(output.dtype))]
    layout = launch.image_format(inputs[0])
    assert results["ours"][0].is_contiguous(memory_format=layout)
    for i, values in enumerate(zip(results["ours"], results["stock"], results["exact"])):
        assert_within_policy(*values, what=f"result {i}")


# (input, weight, options)
CONVOLUTIONS = {
    "context": ((2, 20, 9, 11), (24, 20, 3, 3), dict(padding=5, dilation=5)),
    "rate beyond the map": ((1, 16, 7, 7), (16, 16, 3, 3), dict(padding=12, dilation=12)),
    "padding beyond the kernel": ((1, 5, 6, 6), (8, 5, 3, 3), dict(padding=9, dilation=2)),
    "strided": ((1, 33, 15, 11), (7, 33, 3, 3), dict(stride=2, padding=1)),
    "even kernel": ((1, 8, 9, 8), (12, 8, 4, 4), dict(dilation=4, padding=6)),
    "every axis its own": ((2, 8, 7, 10), (8, 8, 5, 2), dict(padding=(4, 0), dilation=(2, 3), stride=(1, 2))),
    "gaps between windows": ((1, 8, 10, 10), (8, 8, 3, 3), dict(stride=3, padding=7, dilation=4)),
    "one tap": ((2, 70, 5, 6), (40, 70, 1, 1), dict()),
    "no padding": ((1, 6, 11, 11), (9, 6, 7, 7), dict()),
    "row of taps": ((1, 8, 8, 12), (5, 8, 1, 15), dict(padding="same")),
    "column of taps": ((1, 8, 12, 8), (5, 8, 7, 1), dict(padding="same")),
    "three groups": ((1, 12, 9, 8), (18, 4, 3, 2), dict(groups=3, stride=(2, 1), padding=(3, 1), dilation=(2, 3))),
    "runs of pixels": ((1, 8, 8, 16), (8, 8, 3, 3), dict(padding=4, dilation=4)),
    "depthwise": ((2, 6, 9, 11), (6, 1, 3, 3), dict(padding=4, dilation=4, groups=6)),
    "depthwise runs": ((1, 5, 8, 16), (5, 1, 3, 3), dict(padding=4, dilation=4, groups=5)),
    "depthwise strided": ((1, 4, 11, 9), (4, 1, 5, 2), dict(stride=(2, 3), padding=(4, 1), dilation=(2, 1), groups=4)),
}
TRANSPOSED = {
    "bilinear x2": ((1, 21, 5, 4), (21, 21, 4, 4), dict(stride=2, padding=1)),
    "x4": ((1, 3, 2, 3), (3, 2, 8, 8), dict(stride=4, padding=2)),
    "x8 along rows": ((1, 3, 3, 2), (3, 2, 2, 9), dict(stride=(1, 8), padding=(0, 1))),
    "up": ((1, 16, 4, 5), (16, 8, 2, 2), dict(stride=2)),
    "output padding": ((1, 6, 4, 3), (6, 5, 3, 3), dict(stride=2, output_padding=1)),
    "from one pixel": ((2, 24, 1, 1), (24, 9, 7, 7), dict()),
    "stride 1": ((1, 8, 6, 7), (8, 8, 3, 3), dict(padding=1)),
    "outputs without taps": ((1, 4, 4, 3), (4, 5, 2, 1), dict(stride=(4, 3), output_padding=(3, 2))),
    "rates and phases": ((1, 6, 5, 4), (6, 5, 3, 4), dict(stride=(4, 3), dilation=(6, 2), padding=(3, 1))),
    "three groups": ((1, 12, 5, 4), (12, 2, 3, 5), dict(stride=(3, 2), padding=(1, 4), dilation=(2, 3), groups=3)),
    "crop": ((1, 4, 4, 5), (4, 3, 4, 4), dict(stride=2, crop=(1, 3, 5, 4))),
    "depthwise x2": ((2, 5, 4, 3), (5, 1, 4, 4), dict(stride=2, padding=1, groups=5)),
    "depthwise x4": ((1, 4, 2, 3), (4, 1, 8, 8), dict(stride=4, padding=2, groups=4)),
    "depthwise rates and phases": (
        (1, 6, 5, 4),
        (6, 1, 3, 5),
        dict(stride=(4, 6), dilation=(6, 4), padding=(3, 1), output_padding=(3, 2), groups=6),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, layout):
    input, weight, options = CONVOLUTIONS[name]
    compare(ours_convolution, stock_convolution, tensors(input, weight, (weight[0],), None, layout=layout), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name, layout):
    input, weight, options = TRANSPOSED[name]
    channels = weight[1] * options.get("groups", 1)
    compare(ours_transposed, stock_transposed, tensors(input, weight, (channels,), None, layout=layout), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["strided", "runs of pixels", "row of taps", "depthwise runs"])
def test_half_types(name, dtype, layout):
    input, weight, options = CONVOLUTIONS[name]
    inputs = tensors(input, weight, (weight[0],), None, dtype=dtype, layout=layout)
    compare(ours_convolution, stock_convolution, inputs, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("residual", [(2, 6, 7, 8), (2, 6, 1, 1), (1, 1, 7, 8)])
def test_epilogue(residual, groups, layout):
    shapes = (2, 6, 7, 8), (6, 6 // groups, 3, 3), (6,), residual
    inputs = tensors(*shapes, layout=layout)
    compare(ours_convolution, stock_convolution, inputs, relu=True, padding=2, dilation=2, groups=groups)


@pytest.mark.parametrize("groups", [1, 5])
def test_skip_of_a_transposed_convolution(groups):
    inputs = tensors((1, 5, 4, 4), (5, 5 // groups, 4, 4), None, (1, 5, 14, 15))
    options = dict(stride=2, crop=(1, 2, 6, 7), skip_offset=(3, 5), groups=groups)
    compare(ours_transposed, stock_transposed, inputs, relu=True, **options)


@pytest.mark.parametrize("groups", [1, 3])
def test_relu_keeps_nan(groups):
    input = torch.full((1, 3, 2, 2), float("nan"))
    output = ours_convolution(input, torch.ones(3, 3 // groups, 1, 1), None, None, True, groups=groups)
    assert output.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_parts_of_weight_gradients_are_added(groups, layout, monkeypatch):
    for module in (triton_weight, triton_depthwise):
        monkeypatch.setattr(module, "processors", lambda device: 8)
    inputs = tensors((3, 4, 15, 16), (4, 4 // groups, 2, 1), None, None, layout=layout)
    compare(ours_convolution, stock_convolution, inputs, padding=(3, 0), dilation=5, groups=groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4])
def test_64_bit_offsets(groups, layout, monkeypatch):
    for module in (dense, triton_weight, triton_depthwise):
        monkeypatch.setattr(module, "is_wide", lambda *images: True)
    inputs = tensors((2, 4, 6, 7), (4, 4 // groups, 3, 3), (4,), (2, 4, 6, 7), layout=layout)
    compare(ours_convolution, stock_convolution, inputs, padding=2, dilation=2, groups=groups)


def test_which_tensors_need_64_bit_offsets():
    small, large = torch.empty(2, 8, 64, 64, device="meta"), torch.empty(2, 2**14, 2**9, 2**9, device="meta")
    assert not launch.is_wide(small, None) and launch.is_wide(small, None, large)
    assert launch.is_wide(large[:, :8, :64, :64]) and not launch.is_wide(small.expand(2, 8, 64, 64))
    assert launch.is_wide(torch.empty(1, 1, 1, 1, device="meta").expand(2**9, 8, 2**11, 2**11))


@pytest.mark.parametrize("groups", [1, 4])
def test_second_derivatives(groups):
    shapes = (1, 4, 6, 5), (4, 4 // groups, 3, 2)

    def run(function, input, weight):
        output = function(input, weight, None, None, False, stride=(1, 2), padding=2, dilation=2, groups=groups)
        first = torch.autograd.grad(output.square().sum(), (input, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (input, weight))

    inputs = tensors(*shapes)
    exact = run(stock_convolution, *(value.detach().double().requires_grad_() for value in inputs))
    for values in zip(run(ours_convolution, *inputs), run(stock_convolution, *inputs), exact):
        assert_within_policy(*values)


@pytest.mark.parametrize("groups", [1, 2])
def test_empty_batch(groups):
    input, weight = torch.empty(0, 2, 5, 5, requires_grad=True), torch.randn(2, 2 // groups, 3, 3, requires_grad=True)
    output = ours_convolution(input, weight, None, None, False, groups=groups)
    assert output.shape == (0, 2, 3, 3)
    output.sum().backward()
    assert not weight.grad.any() and input.grad.shape == input.shape


def test_tf32_is_pytorchs_setting():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = setting
            assert launch.precision(torch.float32) == setting
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert launch.precision(torch.bfloat16) == "tf32"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_weights(layout):
    weight = torch.randn(6, 4, 3, 2).contiguous(memory_format=layout)
    taps = launch.packed(weight, 2, False, 2, 8)
    assert taps.shape == (2, 6, 4, 8) and not taps[:, :, 3:].any() and not taps[..., 4:].any()
    assert torch.equal(taps[1, 3, :3, :4], weight[3:, :, 1, 1])
    taps = launch.packed(weight, 2, True, 2, 3)
    assert taps.shape == (2, 6, 4, 3)
    assert torch.equal(taps[1, 3], weight[3:, :, 1, 1].t())
    assert launch.packed(weight, 1, False, 2, 2).data_ptr() == weight.data_ptr() or layout is LAYOUTS[0]


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("groups", (1, 8))
def test_out_is_written_by_the_kernel(layout, groups, monkeypatch):
    """Some channels of a larger buffer, its neighbours left alone."""
    image, weight = torch.randn(2, 8, 6, 5).contiguous(memory_format=layout), torch.randn(8, 8 // groups, 3, 3)
    buffer = torch.full((2, 12, 6, 5), 7.0).contiguous(memory_format=layout)
    part, version = buffer[:, 2:10], buffer._version
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    returned = convolution.dilated_conv2d(
        image, weight, padding=2, dilation=2, groups=groups, activation="relu", out=part, backend="triton"
    )
    monkeypatch.undo()
    assert returned is part and buffer._version > version
    torch.testing.assert_close(part, F.relu(F.conv2d(image, weight, padding=2, dilation=2, groups=groups)))
    assert (buffer[:, :2] == 7).all() and (buffer[:, 10:] == 7).all()
