"""nms and batched_nms: golden values, a brute force in NumPy, hostile numbers, ties, static results."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import batched_nms, nms
from tests.contract import Case, Contract, Make

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")
GOLDEN_BOXES = torch.tensor(
    [[0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 5], [20, 20, 30, 30], [21, 21, 31, 31]], dtype=torch.float32
)
GOLDEN_SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.65])
NAN, INF = float("nan"), float("inf")


def numpy_overlaps(box, others):
    """IoU of one box with others (N, 4), in the arithmetic of their dtype."""
    with numpy.errstate(all="ignore"):
        size = numpy.minimum(box[2:], others[:, 2:]) - numpy.maximum(box[:2], others[:, :2])
        size = numpy.where(size > 0, size, size.dtype.type(0))
        shared = size[:, 0] * size[:, 1]
        areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
        return shared / ((box[2] - box[0]) * (box[3] - box[1]) + areas - shared)


def brute_force(boxes, scores, iou_threshold, idxs=None, max_output=None):
    """The kept boxes, decided one box after the other."""
    dtype = numpy.float64 if torch.float64 in (boxes.dtype, scores.dtype) else numpy.float32
    boxes = boxes.detach().to(torch.float64).numpy().astype(dtype)
    scores = scores.detach().to(torch.float64).numpy().astype(dtype)
    classes = numpy.zeros(len(scores), numpy.int64) if idxs is None else idxs.numpy().astype(numpy.int64)
    order = sorted(range(len(scores)), key=lambda i: (not numpy.isnan(scores[i]), -scores[i]))  # stable
    kept = []
    for i in order:
        better = numpy.array([k for k in kept if classes[k] == classes[i]], dtype=numpy.int64)
        overlaps = numpy_overlaps(boxes[i], boxes[better]).astype(numpy.float64)
        if not (overlaps > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept[:max_output], dtype=torch.int64)


def static_brute_force(boxes, scores, iou_threshold, idxs=None, max_output=None):
    kept = brute_force(boxes, scores, iou_threshold, idxs, max_output)
    padding = torch.full((max_output - len(kept),), -1)
    return torch.cat([kept, padding]), torch.tensor(len(kept))


def box_case(count, **options):
    """Boxes of which many overlap. A corner may be to the left of its opposite: a box without area."""

    def arguments(make):
        boxes, scores = make.floating(count, 4), make.floating(count)
        with torch.no_grad():
            boxes[:, 2:] += 3
        extra = {"idxs": make.labels(count, classes=3)} if options.get("classes") else {}
        static = {name: value for name, value in options.items() if name != "classes"}
        return dict(boxes=boxes, scores=scores, iou_threshold=0.3, **extra, **static)

    return arguments


def contract(function, name, static, **options):
    options |= {"max_output": 20} if static else {}
    return Contract(
        function=function,
        stock=static_brute_force if static else brute_force,
        cases=[
            Case("usual", box_case(50, **options)),
            Case("blocks", box_case(131, **options)),
            Case("one box", box_case(1, **options)),
            Case("no box", box_case(0, **options)),
        ],
        layouts=("contiguous", "sliced"),
        exact=True,
        compile_whole=static,
        name=name,
    )


CONTRACTS = [
    contract(nms, "nms", static=False),
    contract(nms, "nms_static", static=True),
    contract(batched_nms, "batched_nms", static=False, classes=True),
    contract(batched_nms, "batched_nms_static", static=True, classes=True),
]


def random_boxes(count, image=100.0, size=30.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * image
    sizes = torch.rand(count, 2, generator=generator) * size
    scores = torch.randperm(count, generator=generator).float() / max(count, 1)
    return torch.cat([corners, corners + sizes], 1).to(dtype), scores.to(dtype)


# --- values ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold, kept", [(0.3, [0, 4]), (0.5, [0, 2, 4]), (0.7, [0, 1, 2, 4, 3])])
def test_golden(threshold, kept, dtype, backend, device):
    boxes, scores = GOLDEN_BOXES.to(device, dtype), GOLDEN_SCORES.to(device, dtype)
    result = nms(boxes, scores, threshold, backend=backend)
    assert result.dtype == torch.int64 and result.tolist() == kept
    assert batched_nms(boxes, scores, torch.zeros(5).long().to(device), threshold, backend=backend).tolist() == kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [15, 16, 17, 63, 64, 65, 500])
def test_random_boxes(count, threshold, backend, device):
    boxes, scores = random_boxes(count, seed=count)
    expected = brute_force(boxes, scores, threshold)
    assert torch.equal(nms(boxes.to(device), scores.to(device), threshold, backend=backend).cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_thresholds_that_boxes_hit_exactly(dtype, device):
    """IoU of small integer boxes is a fraction; the threshold is that fraction as a float, and an ulp more or less."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 4, (60, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 5, (60, 2), generator=generator)], 1).to(device, dtype)
    scores = torch.randperm(60, generator=generator).to(device, dtype)
    for fraction in (1 / 3, 1 / 7, 0.1, 2 / 3, 0.25, 3 / 7, float(numpy.float32(0.1)), float(numpy.float32(1 / 3))):
        for threshold in (fraction, numpy.nextafter(fraction, 0), numpy.nextafter(fraction, 1)):
            expected = brute_force(boxes.cpu(), scores.cpu(), threshold)
            for backend in BACKENDS:
                assert torch.equal(nms(boxes, scores, threshold, backend=backend).cpu(), expected)


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_by_index_and_nan_comes_first(backend, device):
    apart = torch.tensor([[i, 0, i + 1, 1] for i in range(0, 12, 2)], dtype=torch.float32, device=device)
    scores = torch.tensor([0.0, 1, -0.0, NAN, 1, NAN], device=device)
    assert nms(apart, scores, 0.5, backend=backend).tolist() == [3, 5, 1, 4, 0, 2]
    same = torch.ones(40, 4, device=device).cumsum(1)
    assert nms(same, torch.zeros(40, device=device), 0.5, backend=backend).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_without_area_are_kept(backend, device):
    point, line = [3.0, 3, 3, 3], [0.0, 0, 0, 5]
    boxes = torch.tensor([point, point, line, line, [0, 0, 9, 9], [5, 5, 4, 4]], device=device)
    assert nms(boxes, torch.arange(6.0, 0, -1, device=device), 0.0, backend=backend).tolist() == [0, 1, 2, 3, 4, 5]


SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, 3.0, -1.0, 1e30, -1e30, 3e38, 1e-40]


@pytest.mark.sanitized
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_numbers_equal_the_brute_force(data):
    count = data.draw(st.integers(0, 40), "count")
    value = st.sampled_from(SPECIAL) | st.integers(0, 6).map(float)
    draw = lambda size: data.draw(st.lists(value, min_size=size, max_size=size))  # noqa: E731
    boxes = torch.tensor(draw(4 * count)).reshape(count, 4)
    scores = torch.tensor(draw(count))
    threshold = data.draw(st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), "threshold")
    idxs = torch.randint(-2, 2, (count,)) if data.draw(st.booleans()) else torch.zeros(count, dtype=torch.int64)
    most = data.draw(st.integers(0, count + 3), "most")
    expected = brute_force(boxes, scores, threshold, idxs)
    for backend in BACKENDS:
        assert torch.equal(batched_nms(boxes, scores, idxs, threshold, backend=backend), expected)
        found, number = batched_nms(boxes, scores, idxs, threshold, max_output=most, backend=backend)
        assert torch.equal(found[:number], expected[:most]) and (found[number:] == -1).all() and len(found) == most


# --- properties ---


def test_idempotent(device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(300))
    kept = nms(boxes, scores, 0.4)
    assert 20 < len(kept) < 300
    assert nms(boxes[kept], scores[kept], 0.4).tolist() == list(range(len(kept)))


def test_the_order_of_distinct_scores_does_not_matter(device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(300))
    kept = nms(boxes, scores, 0.4)
    shuffle = torch.randperm(300, device=device)
    assert torch.equal(shuffle[nms(boxes[shuffle], scores[shuffle], 0.4)], kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("idxs_dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_classes_do_not_touch_each_other(idxs_dtype, backend, device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(200))
    idxs = torch.randint(0, 5, (200,), device=device)
    alone = [(idxs == k).nonzero()[:, 0][nms(boxes[idxs == k], scores[idxs == k], 0.3)] for k in range(5)]
    expected = torch.cat(alone)
    expected = expected[scores[expected].argsort(descending=True)]
    assert torch.equal(batched_nms(boxes, scores, idxs.to(idxs_dtype), 0.3, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_integers_are_classes(backend, device):
    boxes = torch.tensor([[0.0, 0, 4, 4]], device=device).repeat(6, 1)
    idxs = torch.tensor([2**63 - 1, -(2**63), 0, 2**32, 2**63 - 1, 0], device=device)
    scores = torch.arange(6.0, 0, -1, device=device)
    assert batched_nms(boxes, scores, idxs, 0.5, backend=backend).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_boxes_where_an_offset_would_overflow(dtype, backend, device):
    """Pairs of equal boxes at large coordinates, of 200 classes: an offset of class * 60001 is infinite in fp16."""
    corner = torch.rand(200, 2, device=device) * 50000
    boxes = torch.cat([corner, corner + 9000], 1).repeat(2, 1).to(dtype)
    idxs = torch.arange(200, device=device).repeat(2)
    scores = torch.linspace(1, 0, 400, device=device)
    assert batched_nms(boxes, scores, idxs, 0.5, backend=backend).tolist() == list(range(200))


def test_scores_may_be_of_another_dtype(device):
    boxes, scores = random_boxes(100)
    expected = nms(boxes, scores, 0.4)
    close = 1 + torch.arange(100, dtype=torch.float64).flip(0) * 1e-12  # equal in fp32
    assert torch.equal(nms(boxes.to(device), scores.double().to(device), 0.4).cpu(), expected)
    assert nms(boxes.to(device), close.to(device), 1.0).tolist() == list(range(100))
    half = boxes.half()
    assert torch.equal(nms(half.to(device), scores.to(device), 0.4).cpu(), brute_force(half, scores, 0.4))


# --- static results ---


@pytest.mark.parametrize("count", [0, 1, 2, 70])
def test_static_results_compile(count, device):
    def detect(boxes, scores):
        indices, count = nms(boxes, scores, 0.5, max_output=16)
        return indices + 1, count

    boxes, scores = (tensor.to(device) for tensor in random_boxes(count))
    expected = detect(boxes, scores)
    torch._dynamo.reset()
    for one, two in zip(torch.compile(detect, fullgraph=True, backend="aot_eager")(boxes, scores), expected):
        assert torch.equal(one, two)


class Detector(torch.nn.Module):
    def __init__(self, max_output):
        super().__init__()
        self.max_output = max_output

    def forward(self, boxes, scores, idxs):
        return batched_nms(boxes, scores, idxs, 0.5, max_output=self.max_output)


@pytest.mark.parametrize("max_output", [16, None])
def test_one_exported_program_fits_any_number_of_boxes(max_output):
    boxes, scores = random_boxes(50)
    number = torch.export.Dim("number")
    program = torch.export.export(
        Detector(max_output), (boxes, scores, torch.arange(50) % 3), dynamic_shapes=({0: number},) * 3
    ).module()
    for count in (2, 50, 77):
        boxes, scores = random_boxes(count, seed=1)
        idxs = torch.arange(count) % 3
        results, expected = program(boxes, scores, idxs), Detector(max_output)(boxes, scores, idxs)
        for one, two in zip(results, expected):
            assert torch.equal(one, two)


@pytest.mark.parametrize("max_output", [16, None])
def test_a_traced_program_fits_any_number_of_boxes(max_output):
    boxes, scores = random_boxes(50)
    program = torch.jit.trace(Detector(max_output), (boxes, scores, torch.arange(50) % 3))
    boxes, scores = random_boxes(90, seed=1)
    arguments = boxes, scores, torch.arange(90) % 3
    results, expected = program(*arguments), Detector(max_output)(*arguments)
    for one, two in zip(results, expected):
        assert torch.equal(one, two)


@pytest.mark.sanitized
@pytest.mark.parametrize("most", [0, 1, 5, 500])
def test_static_results_are_the_best(most, device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(200))
    kept = nms(boxes, scores, 0.4)
    for backend in BACKENDS:
        indices, count = nms(boxes, scores, 0.4, max_output=most, backend=backend)
        assert count.shape == () and count.dtype == torch.int64 and count == min(most, len(kept))
        assert torch.equal(indices[:count], kept[:most]) and (indices[count:] == -1).all()


# --- arguments ---


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(boxes=torch.zeros(3, 5)), RuntimeError, r"boxes has shape \(3, 5\); allowed: \(N, 4\)"),
        (dict(boxes=torch.zeros(12)), RuntimeError, r"boxes has shape \(12,\)"),
        (dict(boxes=torch.zeros(3, 4).int()), RuntimeError, "boxes has dtype int32"),
        (dict(boxes=[[0, 0, 1, 1]]), TypeError, "boxes is list; allowed: torch.Tensor"),
        (dict(scores=torch.zeros(4)), RuntimeError, r"scores has shape \(4,\); allowed: \(3\) \(one score per box\)"),
        (dict(scores=torch.zeros(3, 1)), RuntimeError, "scores has shape"),
        (dict(scores=torch.zeros(3).long()), RuntimeError, "scores has dtype int64"),
        (dict(scores=torch.zeros(3, device="meta")), RuntimeError, "scores is on meta; allowed: cpu"),
        (dict(iou_threshold=NAN), ValueError, "iou_threshold=nan; allowed: 0 to 1"),
        (dict(iou_threshold=50), ValueError, "iou_threshold=50.0; allowed: 0 to 1"),
        (dict(iou_threshold="0.5"), TypeError, "iou_threshold='0.5'; allowed: a number"),
        (dict(max_output=-1), ValueError, "max_output=-1"),
        (dict(max_output=2.5), TypeError, "max_output=.*2.5.*; allowed: an int, or None"),
        (dict(max_output=True), TypeError, "max_output=.*True"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "iou_threshold": 0.5, **changes}
    with pytest.raises(error, match=f"fastseg.ops.nms: {message}"):
        nms(**arguments)
    with pytest.raises(error, match=f"fastseg.ops.batched_nms: {message}"):
        batched_nms(**arguments, idxs=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("idxs", [None, [0, 0, 0], torch.zeros(3), torch.zeros(4).long(), torch.zeros(3, 1).long()])
def test_bad_classes_are_named(idxs):
    with pytest.raises((RuntimeError, TypeError), match="fastseg.ops.batched_nms: idxs .*; allowed"):
        batched_nms(torch.zeros(3, 4), torch.zeros(3), idxs, 0.5)


def test_inputs_are_left_alone():
    boxes, scores = random_boxes(100)
    before = boxes.clone(), scores.clone()
    nms(boxes, scores, 0.5)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


def test_results_do_not_depend_on_threads():
    boxes, scores = random_boxes(2000)
    idxs = torch.randint(0, 40, (2000,))
    expected = batched_nms(boxes, scores, idxs, 0.3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(batched_nms(boxes, scores, idxs, 0.3), expected)
    finally:
        torch.set_num_threads(threads)


def test_gradients_stop_here():
    arguments = box_case(20)(Make(torch.float32))
    assert not nms(**arguments).requires_grad
