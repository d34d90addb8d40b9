"""The CUDA kernels on packed masks, run on the CPU: packing, boxes, IoU, suppression, run lengths."""

import pytest
import torch

from fastseg.kernels.mask_iou import reference as iou_reference
from fastseg.kernels.mask_nms import reference as nms_reference
from fastseg.kernels.masks_to_boxes import reference as boxes_reference
from fastseg.kernels.matrix_nms import reference as matrix_reference
from fastseg.kernels.pack_masks import reference as pack_reference
from fastseg.kernels.run_lengths import reference as runs_reference
from tests.ops._masks import ellipses, noise

ops = torch.ops.fastseg_emulator
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDTHS = (1, 31, 32, 33, 65, 300)


def filled(*shape, dtype=torch.int64):
    return torch.full(shape, -7, dtype=dtype)


def packed(masks, threshold=None):
    count, height, width = masks.shape
    words, boxes = filled(count, height, -(-width // 32), dtype=torch.int32), filled(count, 4, dtype=torch.int32)
    area = filled(count)
    ops._pack_masks(masks, threshold, words, area, boxes)
    return words, area, boxes


def equal(ours, expected):
    assert len(ours) == len(expected)
    for one, two in zip(ours, expected):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [ellipses, noise])
def test_pack_and_unpack(make, width):
    masks = make(5, 9, width)
    parts = packed(masks)
    equal(parts, pack_reference.pack_masks(masks, None))
    for dtype in (torch.bool, torch.uint8, *FLOATS):
        unpacked = torch.full((5, 9, width), 1, dtype=dtype)
        ops._unpack_masks(parts[0], width, dtype, unpacked)
        assert torch.equal(unpacked, masks.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.1, 0.3, float("inf"), -1e300])
def test_thresholds(dtype, threshold):
    special = [float("nan"), 0.1, 0.3, -0.0, float("inf"), 0.2, -float("inf")]
    values = torch.tensor(special).repeat(10).to(dtype).view(1, 2, 35)
    equal(packed(values, threshold), pack_reference.pack_masks(values, threshold))


@pytest.mark.parametrize("threshold", [None, -1.5, -1.0, 0.0, 0.5, 254.5, 255.0, 1e300])
def test_bytes(threshold):
    values = torch.arange(256, dtype=torch.uint8).view(1, 4, 64)
    equal(packed(values, threshold), pack_reference.pack_masks(values, threshold))


def test_strides():
    masks = noise(4, 10, 80)
    for view in (masks[:, ::2, 3:70], masks.transpose(1, 2), masks[:1].expand(3, 10, 80), masks[..., ::3]):
        equal(packed(view), pack_reference.pack_masks(view, None))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape):
    masks = torch.zeros(shape, dtype=torch.bool)
    equal(packed(masks), pack_reference.pack_masks(masks, None))


@pytest.mark.parametrize("density", [0.001, 0.5])
def test_statistics(density):
    words = packed(noise(20, 33, 200, density=density))[0]
    area, boxes = filled(20), filled(20, 4, dtype=torch.int32)
    ops._mask_statistics(words, area, boxes)
    equal((area, boxes), boxes_reference.mask_statistics(words))


def iou_of(a, b, crowd=None, denominator=0, pairs=False, labels=None):
    dtype = torch.int64 if denominator == iou_reference.NOTHING else torch.float32
    iou = filled(len(a[1]), dtype=dtype) if pairs else filled(len(a[1]), len(b[1]), dtype=dtype)
    ops._mask_iou(*a, *b, crowd, labels, denominator, pairs, iou)
    return iou


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [ellipses, noise])
def test_iou(make, width):
    a, b = packed(make(9, 12, width, seed=1)), packed(make(37, 12, width, seed=2))
    crowd = torch.arange(37) % 3 == 0
    calls = [(a, b, None, 0, False), (a, b, None, 1, False), (b, b, None, 0, False), (a, b, crowd, 0, False),
             (b, b, crowd, 0, False), (b, b, None, 1, True), (a, b, None, 2, False), (b, b, None, 2, False),
             (b, b, None, 2, True)]  # fmt: skip
    for one, other, flags, denominator, pairs in calls:
        expected = iou_reference.mask_iou(one[0], one[1], other[0], other[1], flags, None, denominator, pairs)
        equal([iou_of(one, other, flags, denominator, pairs)], [expected])


def test_iou_within_labels():
    parts, labels = packed(ellipses(70, 12, 65)), torch.randint(3, (70,))
    expected = iou_reference.mask_iou(parts[0], parts[1], parts[0], parts[1], None, labels, 0, False)
    equal([iou_of(parts, parts, labels=labels)], [expected])


def nms(parts, order, labels, threshold, room=None):
    keep, count = filled(len(order) if room is None else room), filled()
    ops._mask_nms(*parts, order, labels, threshold, room, keep, count)
    return keep, count


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms(count, threshold):
    parts = packed(ellipses(count, 20, 45, seed=count, groups=max(1, count // 5)))
    order, labels = torch.randperm(count), torch.randint(2, (count,))
    for given_labels in (None, labels):
        for room in (None, 0, 3, 40, 150):
            expected = nms_reference.mask_nms(parts[0], parts[1], order, given_labels, threshold, room)
            equal(nms(parts, order, given_labels, threshold, room), expected)


def test_more_masks_than_the_sweep_has_threads_for():
    parts = packed(ellipses(70, 4, 8).repeat(20, 1, 1))
    order = torch.randperm(1400)
    equal(nms(parts, order, None, 0.5), nms_reference.mask_nms(parts[0], parts[1], order, None, 0.5, None))


@pytest.mark.parametrize(
    "box", [[-(2**31), -(2**31), 2**31 - 1, 2**31 - 1], [0, 0, 999, 999], [50, 50, 0, 0], [-9, -9, -1, -1]]
)
def test_hostile_boxes_and_indices_stay_inside(box):
    words, area, boxes = packed(ellipses(5, 12, 40))
    boxes = torch.tensor([box] * 5, dtype=torch.int32)
    iou_of((words, area, boxes), (words, area, boxes))
    for order in (torch.tensor([0, 1, 2, 3, 2**62]), torch.full((5,), -1)):
        nms((words, area, boxes), order, None, 0.2)
        decay = filled(5, dtype=torch.float32)
        ops._matrix_decay(torch.rand(5, 5), order, order, True, 2.0, decay)
    runs, counts = filled(5), filled(10)
    ops._count_runs(words, boxes, 40, runs)
    for ends in (torch.tensor([2, 4, 6, 8, 10]), torch.tensor([-5, 2**62, -(2**62), 3, 10])):
        ops._run_lengths(words, boxes, 40, ends, 10, counts)


@pytest.mark.parametrize("count", [0, 1, 33, 70])
@pytest.mark.parametrize("gaussian", [True, False])
def test_matrix_decay(count, gaussian):
    parts = packed(torch.cat([ellipses(count, 20, 45, groups=max(1, count // 5))] + [noise(1, 20, 45)] * (count > 0)))
    count = len(parts[1])
    iou = iou_of(parts, parts) if count else torch.zeros(0, 0)
    order, labels = torch.randperm(count), torch.randint(2, (count,))
    for given_labels in (None, labels):
        decay = filled(count, dtype=torch.float32)
        ops._matrix_decay(iou, order, given_labels, gaussian, 2.0, decay)
        expected = matrix_reference.matrix_decay(iou, order, given_labels, gaussian, 2.0)
        torch.testing.assert_close(decay, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("height", [1, 2, 21])
def test_run_lengths(width, height):
    masks = torch.cat([noise(4, height, width), ellipses(3, height, width), noise(2, height, width, density=0.9)])
    words, _, boxes = packed(masks)
    runs = filled(len(masks))
    ops._count_runs(words, boxes, width, runs)
    assert torch.equal(runs, runs_reference.count_runs(words, width))
    ends = runs.cumsum(0)
    counts = filled(int(ends[-1]))
    ops._run_lengths(words, boxes, width, ends, int(ends[-1]), counts)
    assert torch.equal(counts, runs_reference.run_lengths(words, width))
