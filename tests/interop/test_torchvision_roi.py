"""Values and gradients of the RoI ops against torchvision's own."""

from collections import OrderedDict

import pytest
import torch

from fastseg import nn, ops

vision = pytest.importorskip("torchvision").ops


def some_boxes(count=40):
    boxes = torch.rand(count, 5, dtype=torch.float64) * 90 - 15
    boxes[:, 3:] = boxes[:, 1:3] + torch.rand(count, 2) * 70
    boxes[:, 0] = torch.randint(2, (count,))
    return boxes


def gradients(function, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)]


def check(ours, theirs, *inputs, tolerance=1e-12):
    for mine, expected in zip(gradients(ours, *inputs), gradients(theirs, *inputs)):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_roi_align(layout, sampling_ratio, aligned, dtype, tolerance):
    boxes, options = some_boxes().to(dtype), ((3, 4), 0.5, sampling_ratio, aligned)
    input = torch.randn(2, 19, 21, 33, dtype=dtype).contiguous(memory_format=layout)
    check(lambda x: ops.roi_align(x, boxes, *options), lambda x: vision.roi_align(x, boxes, *options), input,
          tolerance=tolerance)  # fmt: skip


@pytest.mark.parametrize("size", [2, (3, 5), 14])
def test_roi_pool(size):
    boxes, input = some_boxes(), torch.randn(2, 19, 21, 33, dtype=torch.float64)
    check(lambda x: ops.roi_pool(x, boxes, size, 0.5), lambda x: vision.roi_pool(x, boxes, size, 0.5), input)


def test_multiscale_roi_align():
    maps = [torch.randn(2, 9, 128 >> level, 160 >> level) for level in range(4)]
    names, shapes = ["a", "b", "c", "d"], [(512, 640)] * 2
    boxes = [torch.rand(50, 4) * 300 for _ in range(2)]
    for own in boxes:
        own[:, 2:] = own[:, :2] + torch.rand(50, 2) ** 2 * 600
    pools = nn.MultiScaleRoIAlign(names, 7, 2), vision.MultiScaleRoIAlign(names, 7, 2)
    functions = [lambda *x, pool=pool: pool(OrderedDict(zip(names, x)), boxes, shapes) for pool in pools]
    check(*functions, *maps, tolerance=1e-4)
