"""soft_nms: golden values, a brute force in NumPy that decays every score at every pick, hostile numbers."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import nms, soft_nms
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract
from tests.ops.test_nms import BACKENDS, FLOATS, GOLDEN_BOXES, GOLDEN_SCORES, NAN, SPECIAL, numpy_overlaps, random_boxes

GOLDEN = {
    "linear": {0: 0.9, 4: 0.65, 2: 0.35, 3: 0.191597, 1: 0.17479},
    "gaussian": {0: 0.9, 4: 0.65, 2: 0.424571, 1: 0.259443, 3: 0.237531},
}


def brute_force(
    boxes,
    scores,
    iou_threshold=0.3,
    method="linear",
    sigma=0.5,
    min_score=0.001,
    idxs=None,
    max_output=None,
    dtype=None,
):
    """Decays every score at every pick, in the arithmetic of `dtype`."""
    dtype = dtype or (numpy.float64 if torch.float64 in (boxes.dtype, scores.dtype) else numpy.float32)
    result_dtype = scores.dtype
    boxes = boxes.detach().to(torch.float64).numpy().astype(dtype)
    scores = scores.detach().to(torch.float64).numpy().astype(dtype)
    classes = numpy.zeros(len(scores), numpy.int64) if idxs is None else idxs.numpy()
    waiting = [i for i in range(len(scores)) if not scores[i] < min_score]
    picks, picked_scores = [], []
    while waiting and (max_output is None or len(picks) < max_output):
        best = min(waiting, key=lambda i: (not numpy.isnan(scores[i]), -scores[i]))  # the first of equal scores
        picks.append(best)
        picked_scores.append(scores[best])
        waiting.remove(best)
        overlaps = numpy.nan_to_num(numpy_overlaps(boxes[best], boxes))
        if method == "gaussian":
            with numpy.errstate(under="ignore"):
                wide = overlaps.astype(numpy.promote_types(dtype, numpy.float64))
                weights = numpy.exp(-(wide**2) / sigma).astype(dtype)
        else:
            weights = numpy.where(overlaps.astype(numpy.float64) > iou_threshold, 1 - overlaps, dtype(1))
        for i in waiting:
            if classes[i] == classes[best]:
                scores[i] = 0 if weights[i] == 0 else scores[i] * weights[i]
        waiting = [i for i in waiting if not scores[i] < min_score]
    picked_scores = torch.from_numpy(numpy.array(picked_scores, numpy.float64)).to(result_dtype)
    return torch.tensor(picks, dtype=torch.int64), picked_scores


def static_brute_force(boxes, scores, max_output, **options):
    picks, picked_scores = brute_force(boxes, scores, max_output=max_output, **options)
    padding = max_output - len(picks)
    picked_scores = torch.cat([picked_scores, picked_scores.new_zeros(padding)])
    return torch.cat([picks, picks.new_full((padding,), -1)]), picked_scores, torch.tensor(len(picks))


def box_case(count, **options):
    def arguments(make):
        boxes, scores = make.floating(count, 4), make.floating(count, scale=1)
        with torch.no_grad():
            boxes[:, 2:] += 3
        classes = {"idxs": make.labels(count, classes=3)} if options.get("classes") else {}
        return dict(boxes=boxes, scores=scores, **classes, **{k: v for k, v in options.items() if k != "classes"})

    return arguments


CONTRACTS = [
    Contract(
        function=soft_nms,
        stock=brute_force,
        cases=[
            Case("linear", box_case(50)),
            Case("of classes", box_case(70, classes=True)),
            Case("one box", box_case(1)),
            Case("no box", box_case(0)),
        ],
        layouts=("contiguous", "sliced"),
        exact=True,
        compile_whole=False,
    ),
    Contract(
        function=soft_nms,
        stock=static_brute_force,
        cases=[Case("static", box_case(50, max_output=40)), Case("no box", box_case(0, max_output=3))],
        layouts=("contiguous", "sliced"),
        exact=True,
        name="soft_nms_static",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", GOLDEN)
def test_golden(method, dtype, backend, device):
    boxes, scores = GOLDEN_BOXES.to(device, dtype), GOLDEN_SCORES.to(device, dtype)
    indices, decayed = soft_nms(boxes, scores, method=method, backend=backend)
    assert indices.dtype == torch.int64 and indices.tolist() == list(GOLDEN[method])
    assert decayed.dtype == dtype
    torch.testing.assert_close(
        decayed.cpu().double(),
        torch.tensor(list(GOLDEN[method].values())).double(),
        rtol=2 * torch.finfo(dtype).eps,
        atol=2e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "method, sigma", [("linear", 0.5), ("gaussian", 0.5), ("gaussian", 0.001), ("gaussian", 1e-300)]
)
@pytest.mark.parametrize("count", [15, 16, 17, 33, 250])
def test_random_boxes(count, method, sigma, dtype, backend, device):
    boxes, scores = random_boxes(count, seed=count, dtype=dtype)
    expected = brute_force(boxes, scores, method=method, sigma=sigma)
    exact = brute_force(boxes, scores, method=method, sigma=sigma, dtype=numpy.longdouble)[1]
    indices, decayed = soft_nms(boxes.to(device), scores.to(device), method=method, sigma=sigma, backend=backend)
    assert torch.equal(indices.cpu(), expected[0])
    assert_within_policy(decayed.cpu(), expected[1], exact)


@pytest.mark.sanitized
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_numbers_equal_the_brute_force(data):
    count = data.draw(st.integers(0, 40), "count")
    value = st.sampled_from(SPECIAL) | st.integers(0, 6).map(float)
    draw = lambda size: data.draw(st.lists(value, min_size=size, max_size=size))  # noqa: E731
    boxes = torch.tensor(draw(4 * count)).reshape(count, 4)
    scores = torch.tensor(draw(count))
    options = dict(
        iou_threshold=data.draw(st.sampled_from([0.0, 1 / 3, 0.5, 1.0]), "threshold"),
        method=data.draw(st.sampled_from(["linear", "gaussian"]), "method"),
        min_score=data.draw(st.sampled_from([0.0, 0.001, 1.0, float("inf")]), "min_score"),
        idxs=torch.randint(-2, 2, (count,)) if data.draw(st.booleans()) else None,
        max_output=data.draw(st.integers(0, count + 3), "most"),
    )
    expected = static_brute_force(boxes, scores, **options)
    for backend in BACKENDS:
        for one, two in zip(soft_nms(boxes, scores, **options, backend=backend), expected):
            torch.testing.assert_close(one, two, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_by_index_and_nan_comes_first(backend, device):
    apart = torch.tensor([[i, 0, i + 1, 1] for i in range(0, 14, 2)], dtype=torch.float32, device=device)
    scores = torch.tensor([0.5, 1, 0.5, NAN, 1, NAN, 0.0001], device=device)
    assert soft_nms(apart, scores, backend=backend)[0].tolist() == [3, 5, 1, 4, 0, 2]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_boxes_are_dropped_by_the_linear_method(backend, device):
    """Their weight is 0, which also makes an infinite score 0."""
    same = torch.tensor([[0.0, 0, 1, 1]] * 3 + [[5.0, 5, 6, 6]], device=device)
    scores = torch.tensor([1.0, float("inf"), float("inf"), 0.5], device=device)
    assert soft_nms(same, scores, backend=backend)[0].tolist() == [1, 3]
    kept, decayed = soft_nms(same, scores, min_score=0, backend=backend)
    assert kept.tolist() == [1, 3, 0, 2] and decayed.tolist() == [float("inf"), 0.5, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_sigma_is_hard_suppression(backend, device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(100))
    soft, decayed = soft_nms(boxes, scores, method="gaussian", sigma=1e-300, backend=backend)
    kept = nms(boxes, scores, 0.0)
    kept = kept[scores[kept] >= 0.001]
    assert torch.equal(soft, kept) and torch.equal(decayed, scores[kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_do_not_touch_each_other(backend, device):
    boxes, scores = (tensor.to(device) for tensor in random_boxes(120))
    idxs = torch.randint(0, 4, (120,), device=device)
    decayed = torch.zeros(120, device=device)
    for k in range(4):
        members = (idxs == k).nonzero()[:, 0]
        indices, own = soft_nms(boxes[members], scores[members], backend=backend)
        decayed[members[indices]] = own
    indices, found = soft_nms(boxes, scores, idxs=idxs.to(torch.int32), backend=backend)
    assert torch.equal(found, decayed[indices]) and len(indices) == (decayed > 0).sum()
    assert (found[1:] <= found[:-1]).all()


@pytest.mark.parametrize("count", [0, 1, 70])
def test_static_results_compile(count, device):
    def pick(boxes, scores):
        return soft_nms(boxes, scores, method="gaussian", max_output=16)

    boxes, scores = (tensor.to(device) for tensor in random_boxes(count))
    torch._dynamo.reset()
    for one, two in zip(torch.compile(pick, fullgraph=True, backend="aot_eager")(boxes, scores), pick(boxes, scores)):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(boxes=torch.zeros(3, 5)), RuntimeError, r"boxes has shape \(3, 5\); allowed: \(N, 4\)"),
        (dict(scores=torch.zeros(4)), RuntimeError, r"scores has shape \(4,\)"),
        (dict(idxs=torch.zeros(3)), RuntimeError, "idxs has dtype float32; allowed: int64, int32"),
        (dict(iou_threshold=NAN), ValueError, "iou_threshold=nan; allowed: 0 to 1"),
        (dict(method="hard"), ValueError, "method='hard'; allowed: 'linear', 'gaussian'"),
        (dict(sigma=0), ValueError, "sigma=0.0; allowed: a positive finite number"),
        (dict(sigma=NAN), ValueError, "sigma=nan"),
        (dict(sigma="wide"), TypeError, "sigma='wide'; allowed: a number"),
        (dict(min_score=-0.1), ValueError, "min_score=-0.1"),
        (dict(min_score=NAN), ValueError, "min_score=nan"),
        (dict(max_output=-1), ValueError, "max_output=-1"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), **changes}
    with pytest.raises(error, match=f"fastseg.ops.soft_nms: {message}"):
        soft_nms(**arguments)
