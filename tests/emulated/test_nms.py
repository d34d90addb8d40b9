"""The CUDA kernels of nms, run on the CPU: the same boxes as the C++ kernel keeps."""

import pytest
import torch

from fastseg.ops.nms import nms_op
from tests.ops.test_nms import GOLDEN_BOXES, GOLDEN_SCORES, SPECIAL, random_boxes


def kernel(boxes, scores, idxs, threshold, most):
    indices, count = torch.full((most,), -7), torch.full((), -7)
    torch.ops.fastseg_emulator._nms(boxes, scores, idxs, threshold, most, indices, count)
    return indices, count


def compare(boxes, scores, idxs=None, threshold=0.4, most=None):
    most = len(scores) if most is None else most
    expected = nms_op(boxes, scores, idxs, threshold, most, backend="cpu")
    for one, two in zip(kernel(boxes, scores, idxs, threshold, most), expected):
        assert torch.equal(one, two)
    return expected


@pytest.mark.parametrize("threshold, kept", [(0.3, [0, 4]), (0.5, [0, 2, 4]), (0.7, [0, 1, 2, 4, 3])])
def test_golden(threshold, kept):
    indices, count = kernel(GOLDEN_BOXES, GOLDEN_SCORES, None, threshold, 5)
    assert indices[:count].tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [0, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 128, 500])
def test_sizes_and_classes(count, classes, dtype):
    boxes, scores = random_boxes(count, seed=count, dtype=dtype)
    compare(boxes, scores, torch.randint(classes, (count,)) if classes else None)


@pytest.mark.parametrize("most", [0, 1, 63, 64, 65, 200, 1000])
def test_no_more_than_wanted(most):
    boxes, scores = random_boxes(400)
    compare(boxes, scores, most=most, threshold=0.6)


@pytest.mark.parametrize("most", [100, 4300])
def test_several_strips(most):
    """The bits of 4096 boxes are kept at a time. Small boxes: nearly all are kept."""
    boxes, scores = random_boxes(4300, size=2.0)
    _, count = compare(boxes, scores, most=most)
    assert count == min(most, count) > 99


def test_strips_of_which_the_first_removes_the_others():
    boxes, scores = random_boxes(4300, image=1.0)
    compare(boxes, scores, threshold=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
def test_hostile_numbers(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([*SPECIAL, 4.0, 5.0, 6.0, 2.0, 3.0], dtype=dtype)
    pick = lambda *shape: values[torch.randint(len(values), shape, generator=generator)]  # noqa: E731
    compare(pick(150, 4), pick(150), torch.randint(2, (150,), generator=generator), threshold=0.25)


def test_a_threshold_that_boxes_hit_exactly():
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 4, (200, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 5, (200, 2), generator=generator)], 1).float()
    for threshold in (1 / 3, 0.1, 0.5, 1 / 7):
        compare(boxes, torch.rand(200, generator=generator), threshold=threshold)
