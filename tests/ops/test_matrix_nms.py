"""matrix_nms: against the loops of its definition, golden values, duplicates, the static form."""

import math

import pytest
import torch

from fastseg.ops import mask_iou, matrix_nms, pack_masks
from tests.contract import Case, Contract
from tests.ops._masks import GOLDEN, GOLDEN_LABELS, GOLDEN_SCORES, ellipses

BACKENDS = ("auto", "reference")


def brute_force(masks, scores, labels=None, method="gaussian", sigma=2.0, min_score=0.05):
    order = scores.argsort(descending=True, stable=True).tolist()
    iou = mask_iou(masks, backend="reference")
    if labels is not None:
        iou = torch.where(labels.unsqueeze(1) == labels, iou, 0)
    overlap = iou[order][:, order].tolist()
    covered = [max([overlap[k][i] for k in range(i)], default=0.0) for i in range(len(order))]
    decayed = []
    for j, index in enumerate(order):
        decay = 1.0
        for i in range(j):
            o, c = overlap[i][j], covered[i]
            if method == "gaussian":
                decay = min(decay, math.exp(-sigma * o * o) / math.exp(-sigma * c * c))
            elif c < 1:
                decay = min(decay, (1 - o) / (1 - c))
        decayed.append((scores[index].item() * decay, index))
    decayed = sorted([pair for pair in decayed if pair[0] >= min_score], key=lambda pair: -pair[0])
    return torch.tensor([i for _, i in decayed], dtype=torch.int64), torch.tensor([score for score, _ in decayed])


def indices_of_floats(scores, masks, backend="auto"):
    return matrix_nms(masks, scores, min_score=0.2, backend=backend)[0]


def matrix_case(groups, count=24):
    def arguments(make):
        masks = ellipses(count, 30, 70, seed=groups, groups=groups).to(make.device)
        return dict(scores=make.floating(count, positive=True), masks=masks)

    return arguments


CONTRACTS = [
    Contract(
        function=indices_of_floats,
        stock=lambda scores, masks: brute_force(masks, scores.detach(), min_score=0.2)[0].to(masks.device),
        name="matrix_nms",
        cases=[
            Case("few objects", matrix_case(5)),
            Case("no masks", matrix_case(1, 0)),
            Case("one mask", matrix_case(1, 1)),
        ],
        layouts=("contiguous", "sliced"),  # expanded scores are equal: rounding would decide the order
        exact=True,
        compile_whole=False,
    )
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "method, decayed", [("gaussian", [0.9, 0.328890, 0.594556, 0.6]), ("linear", [0.9, 0.266667, 0.5, 0.6])]
)
def test_golden(method, decayed, backend):
    indices, scores = matrix_nms(GOLDEN, GOLDEN_SCORES, GOLDEN_LABELS, method=method, backend=backend)
    expected = sorted(range(4), key=lambda i: -decayed[i])
    assert indices.tolist() == expected and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([decayed[i] for i in expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("count", [1, 2, 33, 200])
def test_equals_the_definition(count, method, backend, device):
    masks = ellipses(count, 40, 50, seed=count, groups=max(1, count // 4))
    scores, labels = 0.1 + 0.9 * torch.rand(count), torch.randint(2, (count,))
    for given_labels in (None, labels):
        expected = brute_force(masks, scores, given_labels, method, 1.5, 0.0)
        on_device = None if given_labels is None else given_labels.to(device)
        indices, decayed = matrix_nms(
            masks.to(device), scores.to(device), on_device, method=method, sigma=1.5, min_score=0.0, backend=backend
        )
        by_mask = torch.zeros(2, count)
        by_mask[0][indices.cpu()], by_mask[1][expected[0]] = decayed.cpu(), expected[1]
        torch.testing.assert_close(by_mask[0], by_mask[1], rtol=1e-5, atol=1e-6)
        assert len(indices) == count and (decayed.diff() <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["gaussian", "linear"])
def test_duplicates(method, backend):
    """c_i = 1, where the linear form would divide by zero."""
    masks = ellipses(1, 20, 30).repeat(4, 1, 1)
    indices, scores = matrix_nms(masks, torch.tensor([0.9, 0.8, 0.7, 0.6]), method=method, min_score=0, backend=backend)
    rest = 0.0 if method == "linear" else math.exp(-2)
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.8 * rest, 0.7 * rest, 0.6 * rest]))
    assert indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("room", [0, 1, 5, 60])
def test_the_static_form(room, device):
    masks, scores = ellipses(30, 30, 50, groups=9).to(device), torch.rand(30).to(device)
    function = lambda masks, scores: matrix_nms(masks, scores, max_output=room)  # noqa: E731
    indices, decayed = matrix_nms(masks, scores)
    for program in (function, torch.compile(function, fullgraph=True)):
        padded, padded_scores, count = program(masks, scores)
        assert count == min(room, len(indices)) and padded.shape == padded_scores.shape == (room,)
        assert torch.equal(padded[:count], indices[:room]) and (padded[count:] == -1).all()
        assert torch.equal(padded_scores[:count], decayed[:room]) and (padded_scores[count:] == 0).all()


@pytest.mark.sanitized
def test_what_decays_below_the_least_score_and_nan_are_dropped():
    masks = ellipses(5, 20, 30)
    indices, scores = matrix_nms(masks, torch.tensor([0.9, torch.nan, 0.01, 0.8, -torch.inf]))
    assert set(indices.tolist()) <= {0, 3} and scores.isfinite().all()


PACKED, SCORES = pack_masks(torch.zeros(2, 4, 40).bool()), torch.zeros(2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(method="cubic"), ValueError, "method='cubic'; allowed: 'gaussian', 'linear'"),
        (dict(sigma=-1), ValueError, "sigma=-1.0; allowed: 0 to"),
        (dict(sigma=torch.nan), ValueError, "sigma=nan; allowed: 0 to"),
        (dict(sigma="2"), TypeError, "sigma='2'; allowed: a number"),
        (dict(min_score=torch.nan), ValueError, "min_score=nan"),
        (dict(max_output=-2), ValueError, "max_output=-2"),
        (dict(scores=SCORES[:1]), RuntimeError, r"scores has shape \(1,\)"),
        (dict(labels=SCORES), RuntimeError, "labels has dtype float32"),
        (dict(masks=SCORES), RuntimeError, "masks has dtype float32"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=f"fastseg.ops.matrix_nms: {message}"):
        matrix_nms(**{"masks": PACKED, "scores": SCORES, **options})
