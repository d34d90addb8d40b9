"""The CUDA kernels of roi_align, run on the CPU."""

import pytest
import torch

from fastseg.kernels.roi_align import reference
from fastseg.testing import assert_within_policy

FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
STRANGE = [[-1, 1, 1, 4, 4], [2, 1, 1, 4, 4], [NAN, 1, 1, 4, 4], [0, NAN, 1, 4, 4], [0, 1, 1, INF, 4],
           [1, -INF, 1, 4, 4], [0, -1e9, -1e9, 1e9, 1e9], [1, 3e38, 3e38, -3e38, -3e38],
           [0, 1e20, 1, 1e20, 4]]  # fmt: skip


def some_boxes(count, images=2):
    boxes = torch.rand(count, 5) * 30 - 8
    boxes[:, 3:] += 9
    boxes[:, 0] = torch.randint(images, (count,))
    return boxes


def forward(inputs, boxes, size, scales, areas, ratio, aligned, output):
    levels = [*inputs, *[None] * (5 - len(inputs))]
    torch.ops.fastseg_emulator._roi_align(*levels, boxes, size, scales, areas, ratio, aligned, False, output)
    return output


def backward(grad_output, boxes, scales, areas, ratio, aligned, outputs):
    sizes = [outputs[0].shape[0], *(extent for output in outputs for extent in output.shape[2:])]
    filled = [*outputs, *[grad_output.new_empty(0) for _ in range(5 - len(outputs))]]
    torch.ops.fastseg_emulator._roi_align_backward(
        grad_output, boxes, sizes, scales, areas, ratio, aligned, False, *filled
    )
    return outputs


def check(inputs, boxes, size, scales, areas, ratio, aligned, formats):
    layout, pooled_layout = formats
    inputs = [level.contiguous(memory_format=layout) for level in inputs]
    shape, levels = (boxes.shape[0], inputs[0].shape[1], *size), len(inputs)
    sampling = scales, areas, ratio, aligned

    def exact(values):
        return [value.double() for value in values] + [None] * (5 - levels)

    inside = boxes.clone()
    strange = ~((boxes[:, 0] > -1) & (boxes[:, 0] < inputs[0].shape[0]))
    inside[strange] = torch.tensor([0, NAN, 0, 0, 0])  # gives zeros, as boxes without an image do on a GPU
    output = torch.full(shape, NAN, dtype=inputs[0].dtype).contiguous(memory_format=pooled_layout)
    forward(inputs, boxes, size, *sampling, output)
    plain = reference.roi_align(*inputs, *[None] * (5 - levels), inside, size, *sampling, False)
    true = reference.roi_align(*exact(inputs), inside, size, *sampling, False)
    assert_within_policy(output, plain, true)
    gradient = torch.randn(shape).to(output.dtype).contiguous(memory_format=pooled_layout)
    found = [torch.full_like(level, NAN) for level in inputs]
    backward(gradient, boxes, *sampling, found)
    sizes = [inputs[0].shape[0], *(extent for level in inputs for extent in level.shape[2:])]
    plains = reference.roi_align_backward(gradient, inside, sizes, *sampling, False)
    trues = reference.roi_align_backward(gradient.double(), inside, sizes, *sampling, False)
    for ours, plain, true in zip(found, plains, trues):
        assert_within_policy(ours, plain, true, "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("pooled_layout", FORMATS)
@pytest.mark.parametrize("channels", [3, 8, 20])
def test_every_dtype_and_layout(channels, layout, pooled_layout, dtype):
    input = torch.randn(2, channels, 11, 37).to(dtype)
    check([input], some_boxes(9), (3, 4), [0.9], [], 2, False, (layout, pooled_layout))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    "ratio, size", [(0, (2, 3)), (1, (1, 1)), (3, (35, 2)), (2, (7, 40)), (9, (2, 2)), (60, (2, 2))]
)
def test_samples_and_bins(ratio, size, aligned, layout):
    """Also more bins than a block keeps weights for in shared memory."""
    check([torch.randn(2, 4, 11, 13)], some_boxes(5), size, [0.7], [], ratio, aligned, (layout, layout))


@pytest.mark.parametrize("layout", FORMATS)
def test_more_boxes_than_threads(layout):
    check([torch.randn(2, 4, 9, 10)], some_boxes(300), (2, 2), [0.5], [], 2, False, (layout, layout))


@pytest.mark.parametrize("layout", FORMATS)
def test_levels(layout):
    levels = [torch.randn(2, 8, *size) for size in ((16, 20), (8, 10), (1, 1))]
    boxes = some_boxes(40)
    boxes[:, 3:] += torch.rand(40, 2) * 60
    check(levels, boxes, (2, 2), [0.5, 0.25, 0.125], [400.0, 1600.0], 2, True, (layout, layout))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("aligned", [False, True])
def test_strange_boxes_give_zeros(aligned, layout):
    boxes = torch.cat([torch.tensor(STRANGE), some_boxes(2)])
    check([torch.randn(2, 8, 7, 9)], boxes, (2, 3), [1.0], [], 2, aligned, (layout, layout))
    check([torch.randn(2, 8, 7, 9)], boxes, (2, 3), [1.0], [], 0, aligned, (layout, layout))


def test_no_boxes_and_no_images():
    assert backward(torch.zeros(0, 8, 2, 2), torch.zeros(0, 5), [1.0], [], 2, False,
                    [torch.full((1, 8, 3, 3), NAN)])[0].sum() == 0  # fmt: skip
    assert not forward(
        [torch.zeros(0, 8, 3, 3)], torch.zeros(1, 5), [1, 1], [1.0], [], 2, False, torch.ones(1, 8, 1, 1)
    ).any()
