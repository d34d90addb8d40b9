"""The CUDA kernel of soft_nms, run on the CPU: the same picks as the C++ kernel's, and scores of the same bits."""

import pytest
import torch

from fastseg.ops.soft_nms import soft_nms_op
from tests.ops.test_nms import SPECIAL, random_boxes


def compare(boxes, scores, idxs=None, gaussian=False, threshold=0.3, min_score=0.001, most=None):
    most = len(scores) if most is None else most
    options = idxs, threshold, gaussian, 0.5, min_score, most
    results = torch.full((most,), -7, dtype=boxes.dtype), torch.full((most,), -7), torch.full((), -7)
    torch.ops.fastseg_emulator._soft_nms(boxes, scores, *options, *results)
    for one, two in zip(results, soft_nms_op(boxes, scores, *options, backend="cpu")):
        assert torch.equal(one.view(torch.uint8) if one.dim() else one, two.view(torch.uint8) if two.dim() else two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 33, 200, 520])
def test_sizes_and_classes(count, classes, gaussian, dtype):
    boxes, scores = random_boxes(count, seed=count, dtype=dtype)
    compare(boxes, scores, torch.randint(classes, (count,)) if classes else None, gaussian, most=min(count, 150))


@pytest.mark.parametrize("most", [0, 1, 40, 300])
def test_no_more_than_wanted(most):
    boxes, scores = random_boxes(60)
    compare(boxes, scores, gaussian=True, min_score=0.05, most=most)


def test_boxes_that_begin_off_a_multiple_of_16_bytes():
    boxes, scores = random_boxes(50)
    shifted = torch.cat([torch.zeros(1), boxes.flatten()])[1:].view(50, 4)
    compare(shifted, scores)


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_hostile_numbers(seed, gaussian):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([*SPECIAL, 4.0, 5.0, 6.0, 2.0, 3.0])
    pick = lambda *shape: values[torch.randint(len(values), shape, generator=generator)]  # noqa: E731
    compare(pick(80, 4), pick(80), torch.randint(2, (80,), generator=generator), gaussian, min_score=0.0)
