"""The Triton kernels of upsample_bilinear2d and of the bilinear transposed convolution, in the interpreter."""

from dataclasses import replace

import pytest
import torch

from fastseg.kernels.upsample_bilinear2d import triton as kernels
from fastseg.testing import assert_within_policy
from tests.ops.test_upsample_bilinear2d import CONTRACTS, deconvolution, ours, results
from tests.test_contract import _compare
from tests.triton_interpreter.contracts import Make, check_contracts

SMALL = [case for case in CONTRACTS[0].cases if case.small]
test_contract = check_contracts([replace(CONTRACTS[0], cases=SMALL)])


@pytest.fixture(autouse=True)
def few_programs(request, monkeypatch):
    """But for one case, which takes the tiles that a GPU gets."""
    if "x8" not in request.node.name:
        monkeypatch.setitem(kernels.CONFIGS, "forward", kernels.Config(1024, 16, 64, 4))
        monkeypatch.setitem(kernels.CONFIGS, "gradient", kernels.Config(2048, 16, 0, 4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [case for case in CONTRACTS[0].cases if not case.small], ids=lambda case: case.name)
def test_large(case, layout):
    """Many rows between two elements, several tiles and parts."""
    _compare(CONTRACTS[0], case, Make(torch.float32, layout=layout), backend="triton")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "kernel, stride, padding", [(16, 8, 4), (4, 2, 0), (4, 2, -3), (15, 8, 7), (3, 2, 2), (1, 1, 0)]
)
def test_transposed_convolution(kernel, stride, padding, layout):
    input = torch.randn(1, 3, 3, 4).contiguous(memory_format=layout)
    size = 3 * stride + 5, 4 * stride - 1
    gradient, arguments = torch.randn(1, 3, *size), dict(kernel=kernel, stride=stride, padding=padding, size=size)
    found = results(ours, input, gradient, **arguments, backend="triton")
    plain = results(deconvolution, input, gradient, **arguments)
    exact = results(deconvolution, input.double(), gradient, **arguments)
    for one, two, three in zip(found, plain, exact):
        assert_within_policy(one, two, three)
    input = torch.full((1, 3, 3, 4), float("inf")).contiguous(memory_format=layout)
    expected = ours(input, kernel, stride, padding, size, backend="cpu")
    assert torch.equal(ours(input, kernel, stride, padding, size, backend="triton"), expected)
