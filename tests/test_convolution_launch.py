"""The launchers of the Triton convolutions up to the launch: their arguments, specialised as by Triton, compile.

A driver that only names its target replaces the GPU, so that complete calls are compiled for sm_90. The interpreter
does not specialise on sizes and strides of 1, None, and multiples of 16.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("for the compiler, without a GPU", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastseg.kernels.convolution import triton as dense
from fastseg.kernels.convolution import triton_depthwise, triton_weight

LAYOUTS = torch.contiguous_format, torch.channels_last


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The names of the kernels that were compiled instead of launched."""
    names, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        names.append(self.__name__)
        return run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver())
    return names


# (input, weight, groups, padding, dilation, dtype)
CALLS = {
    "wide": ((2, 128, 64, 64), (256, 128, 3, 3), 1, 2, 2, torch.bfloat16),
    "all sizes 1": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, torch.float32),
    "a column": ((1, 1, 7, 1), (5, 1, 3, 1), 1, 1, 1, torch.float16),
    "odd": ((2, 3, 9, 11), (40, 3, 3, 3), 1, 1, 1, torch.float32),
    "groups": ((1, 12, 9, 9), (6, 4, 3, 3), 3, 1, 1, torch.bfloat16),
    "depthwise": ((1, 32, 16, 16), (32, 1, 3, 3), 32, 4, 4, torch.bfloat16),
    "depthwise, all sizes 1": ((1, 2, 1, 1), (2, 1, 1, 1), 2, 0, 1, torch.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_calls_compile(name, layout, compiled):
    shape, weight_shape, groups, padding, dilation, dtype = CALLS[name]
    input = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.zeros(weight_shape, dtype=dtype)
    windows = [1, 1], [padding, padding if weight_shape[3] > 1 else 0], [dilation, dilation]
    output = torch.nn.functional.conv2d(input, weight, None, *windows, groups).contiguous(memory_format=layout)
    bias, residual = torch.zeros(weight_shape[0], dtype=dtype), torch.zeros_like(output[:, :, :1, :1]).expand_as(output)
    depthwise = groups == shape[1]
    if depthwise and groups > 1:
        maps, gradient, groups = triton_depthwise, triton_depthwise, ()
    else:
        maps, gradient, groups = dense, triton_weight, (groups,)
    maps.dilated_conv2d(input, weight, bias, residual, *windows, *groups, list(output.shape[2:]), True, output)
    maps.dilated_conv2d(input, weight, None, None, *windows, *groups, list(output.shape[2:]), False, output)
    maps.conv_transpose2d(output, weight, None, None, *windows, *groups, list(input.shape[2:]), False, input)
    gradient.conv2d_grad_weight(input, output, *windows, *groups, list(weight_shape[2:]), weight)
    assert len(compiled) >= 4
