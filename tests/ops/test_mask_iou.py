"""mask_iou: against counts in NumPy and pairs of sets, golden values, crowds, properties, hostile input."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import mask_iou, pack_masks
from tests.contract import Case, Contract
from tests.ops._masks import GOLDEN, WIDTHS, ellipses, noise

BACKENDS = ("auto", "reference")


def brute_force(a, b=None, crowd=None, metric="iou", pairs=False):
    """By NumPy's counts of integers, divided once."""
    b = a if b is None else b
    a, b = (masks.cpu().numpy().reshape(len(masks), masks[0].numel() if len(masks) else 0) for masks in (a, b))
    if len(a) == 0 or len(b) == 0:
        size = (len(a),) if pairs else (len(a), len(b))
        return torch.zeros(size, dtype=torch.int64 if metric == "intersection" else torch.float32)
    pair = (lambda x: (x, slice(None))) if pairs else None
    a, b = (a, b) if pair else (a[:, None], b[None])
    common = (a & b).sum(-1).astype(numpy.float64)
    area_a, area_b = a.sum(-1), b.sum(-1)
    if metric == "intersection":
        return torch.from_numpy(common).long()
    whole = numpy.minimum(area_a, area_b) if metric == "ios" else area_a + area_b - common
    if crowd is not None:
        whole = numpy.where(crowd.cpu().numpy(), area_a + 0 * area_b, whole)
    ratio = numpy.divide(common, whole, out=numpy.zeros_like(common), where=whole > 0)
    return torch.from_numpy(ratio.astype(numpy.float32))


def of_floats(masks, metric="iou", backend="auto"):
    return mask_iou(pack_masks(masks, 0, backend=backend), metric=metric, backend=backend)


CONTRACTS = [
    Contract(
        function=of_floats,
        stock=lambda masks, metric="iou": brute_force(masks.detach() > 0, metric=metric).to(masks.device),
        name="mask_iou",
        cases=[
            Case("masks", lambda make: dict(masks=make.floating(5, 6, 40))),
            Case("shared pixels", lambda make: dict(masks=make.floating(5, 6, 40), metric="intersection")),
            Case("no masks", lambda make: dict(masks=make.floating(0, 6, 40))),
            Case("no pixels", lambda make: dict(masks=make.floating(2, 6, 0))),
        ],
        exact=True,
    )
]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [ellipses, noise])
def test_all_with_all_and_pairs(make, width, backend, device):
    a, b = make(7, 13, width, seed=1), make(19, 13, width, seed=2)
    crowd = torch.arange(19) % 3 == 0
    on_device = [pack_masks(masks.to(device)) for masks in (a, b)]
    for metric in ("iou", "ios", "intersection"):
        found = mask_iou(*on_device, metric=metric, backend=backend)
        assert found.dtype == (torch.int64 if metric == "intersection" else torch.float32)
        assert torch.equal(found.cpu(), brute_force(a, b, metric=metric))
        pairs = mask_iou(on_device[0], on_device[1][:7], metric=metric, pairs=True, backend=backend)
        assert torch.equal(pairs.cpu(), brute_force(a, b[:7], metric=metric, pairs=True))
        alone = mask_iou(on_device[1], metric=metric, backend=backend)
        assert torch.equal(alone.cpu(), brute_force(b, metric=metric)) and torch.equal(alone, alone.T)
    found = mask_iou(*on_device, crowd=crowd.to(device), backend=backend)
    assert torch.equal(found.cpu(), brute_force(a, b, crowd))
    alone = mask_iou(on_device[1], crowd=crowd.to(device), backend=backend)
    assert torch.equal(alone.cpu(), brute_force(b, b, crowd))


@pytest.mark.parametrize("width", [640, 1333, 70])
@pytest.mark.parametrize("make", [ellipses, noise])
def test_images(make, width, device):
    """Overlaps of a few words of a row, of most of it, and of more words than a register holds."""
    masks = make(40, 97, width, seed=3)
    assert torch.equal(mask_iou(masks.to(device)).cpu(), brute_force(masks))
    shared = mask_iou(masks.to(device), metric="intersection").cpu()
    assert torch.equal(shared, brute_force(masks, metric="intersection"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend):
    iou = mask_iou(GOLDEN, backend=backend)
    for (i, j), value in {(0, 1): 6 / 9, (0, 2): 4 / 14, (1, 2): 2 / 13, (2, 3): 1 / 9, (0, 3): 0}.items():
        assert iou[i, j] == numpy.float32(value)
    detection, truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    detection.view(-1)[:5] = True
    truth.view(-1)[3:7] = True
    crowd = torch.tensor([True])
    assert mask_iou(detection[None], truth[None], backend=backend).item() == pytest.approx(2 / 7)
    assert mask_iou(detection[None], truth[None], crowd=crowd, backend=backend).item() == pytest.approx(0.4)
    assert mask_iou(detection[None], truth[None], metric="ios", backend=backend).item() == 0.5


def test_dense_masks_are_packed_first():
    masks = ellipses(5, 20, 30)
    assert torch.equal(mask_iou(masks), mask_iou(pack_masks(masks)))
    assert torch.equal(mask_iou(masks, pack_masks(masks).to("cpu")[1:]), mask_iou(masks.byte() * 9)[:, 1:])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 4), st.integers(0, 100), st.integers(0, 2**32))
def test_equals_set_arithmetic(n, m, height, width, seed):
    a, b = noise(n, height, width, seed), noise(m, height, width, seed + 1, density=0.1)
    found = mask_iou(a, b)
    assert torch.equal(found, brute_force(a, b)) and torch.equal(found, mask_iou(b, a).T)
    packed, other = pack_masks(a), pack_masks(b)
    for j in range(m):
        both, either = (packed & other[j]).area, (packed | other[j]).area
        assert torch.equal(found[:, j], torch.where(either > 0, both / either.double(), 0).float())


MASKS, SMALL = pack_masks(torch.zeros(2, 4, 40).bool()), pack_masks(torch.zeros(3, 4, 39).bool())
CROWD = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mask_iou([1]), TypeError, "a is list; allowed: PackedMasks, or a bool or uint8"),
        (lambda: mask_iou(torch.zeros(1, 2, 2)), RuntimeError, "a has dtype float32; allowed: bool, uint8"),
        (lambda: mask_iou(MASKS, SMALL), RuntimeError, "b holds masks of 4 x 39; allowed: 4 x 40, as of a"),
        (lambda: mask_iou(MASKS, MASKS[:1], pairs=True), RuntimeError, "b holds 1 masks; allowed: 2, as a, for pairs"),
        (lambda: mask_iou(MASKS, pairs=True), ValueError, "b=None; allowed with pairs=True: masks"),
        (lambda: mask_iou(MASKS, MASKS, pairs=1), TypeError, "pairs=1; allowed: True or False"),
        (lambda: mask_iou(MASKS, metric="dice"), ValueError, "metric='dice'; allowed: 'iou', 'ios', 'intersection'"),
        (lambda: mask_iou(MASKS, crowd=CROWD, metric="ios"), ValueError, "metric='ios'; allowed with crowd: 'iou'"),
        (lambda: mask_iou(MASKS, crowd=CROWD, metric="intersection"), ValueError, "metric=.*allowed with crowd: 'i"),
        (lambda: mask_iou(MASKS, crowd=CROWD[:1]), RuntimeError, r"crowd has shape \(1,\); allowed: \(2\)"),
        (lambda: mask_iou(MASKS, crowd=CROWD.int()), RuntimeError, "crowd has dtype int32; allowed: bool"),
        (lambda: mask_iou(MASKS, crowd=[True, False]), TypeError, "crowd is list"),
        (lambda: mask_iou(MASKS, MASKS.to("meta")), RuntimeError, "b is on meta; allowed: cpu"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=f"fastseg.ops.mask_iou: {message}"):
        call()


@pytest.mark.sanitized
def test_boxes_outside_of_the_masks_are_refused():
    """Through torch.ops, with boxes that do not come from our ops."""
    packed = pack_masks(ellipses(2, 20, 30))
    for box in ([0, 0, 33, 5], [-1, 0, 5, 5], [0, 0, 5, 21], [0, -(2**31), 5, 5]):
        boxes = torch.tensor([box, box], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="a box lies outside of the masks"):
            known = packed.words, packed.area, boxes
            torch.ops.fastseg.mask_iou(*known, *known, None, None, 0, False)


def test_masks_of_different_labels_share_nothing():
    """With labels, as in matrix_nms."""
    packed, labels = pack_masks(ellipses(40, 20, 70)), torch.randint(3, (40,))
    known = packed.words, packed.area, packed.boxes
    expected = torch.where(labels.unsqueeze(1) == labels, mask_iou(packed), 0)
    for backend in BACKENDS:
        found = torch.ops.fastseg.mask_iou(*known, *known, None, labels, 0, False, backend=backend)
        assert torch.equal(found, expected)
    for wrong, message in ((labels[1:], r"labels has shape \(39,\); allowed: \(40\)"), (labels.int(), "dtype int32")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastseg.mask_iou(*known, *known, None, wrong, 0, False)
