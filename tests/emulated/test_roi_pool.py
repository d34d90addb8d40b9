"""The CUDA kernels of roi_pool, run on the CPU."""

import pytest
import torch

from fastseg.kernels.roi_pool import reference
from tests.emulated.test_roi_align import DTYPES, FORMATS, NAN, STRANGE, some_boxes


def check(input, boxes, size, scale, pooled_layout):
    shape = boxes.shape[0], input.shape[1], *size
    inside = boxes.clone()
    inside[~((boxes[:, 0] > -1) & (boxes[:, 0] < input.shape[0]))] = torch.tensor([0, NAN, 0, 0, 0])
    output = torch.full(shape, NAN, dtype=input.dtype).contiguous(memory_format=pooled_layout)
    argmax = torch.full(shape, 77, dtype=torch.int32).contiguous(memory_format=pooled_layout)
    torch.ops.fastseg_emulator._roi_pool(input, boxes, size, scale, False, output, argmax)
    expected, places = reference.roi_pool(input, inside, size, scale, False)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(argmax, places)
    gradient = torch.randint(-3, 4, shape).to(input.dtype).contiguous(memory_format=pooled_layout)  # exact sums
    found = torch.full_like(input, NAN)
    plane = [input.shape[0], *input.shape[2:]]
    torch.ops.fastseg_emulator._roi_pool_backward(gradient, argmax, boxes, plane, scale, False, found)
    assert torch.equal(found, reference.roi_pool_backward(gradient, places, inside, plane, scale, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pooled_layout", FORMATS)
@pytest.mark.parametrize("channels", [3, 8, 20])
def test_every_dtype_and_layout(channels, layout, pooled_layout, dtype):
    input = torch.randint(-5, 6, (2, channels, 11, 37)).to(dtype).contiguous(memory_format=layout)
    input[torch.rand(input.shape) < 0.02] = NAN
    check(input, some_boxes(9), (3, 4), 0.9, pooled_layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (13, 2), (2, 40)])
def test_bins_and_strange_boxes(size, layout):
    boxes = torch.cat([torch.tensor(STRANGE), some_boxes(4)])
    check(torch.randn(2, 8, 7, 9).contiguous(memory_format=layout), boxes, size, 1.0, layout)


def test_more_boxes_than_threads():
    check(torch.randn(2, 4, 9, 10), some_boxes(300), (2, 2), 0.5, torch.contiguous_format)
