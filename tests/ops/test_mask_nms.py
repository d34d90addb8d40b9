"""mask_nms: against a loop over sets, golden values, ties, labels, the static form, properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import PackedMasks, mask_nms, pack_masks
from tests.contract import Case, Contract
from tests.ops._masks import GOLDEN, GOLDEN_LABELS, GOLDEN_SCORES, WIDTHS, ellipses, noise

BACKENDS = ("auto", "reference")


def brute_force(masks, scores, iou_threshold, labels=None):
    masks = masks.cpu().flatten(1)
    kept = []
    for j in scores.cpu().argsort(descending=True, stable=True).tolist():
        for i in kept:
            common, union = (masks[i] & masks[j]).sum().item(), (masks[i] | masks[j]).sum().item()
            if (labels is None or labels[i] == labels[j]) and common / max(union, 1) > iou_threshold:
                break
        else:
            kept.append(j)
    return torch.tensor(kept, dtype=torch.int64)


def nms_case(groups, count=40):
    def arguments(make):
        masks = ellipses(count, 30, 70, seed=groups, groups=groups).to(make.device)
        return dict(scores=make.floating(count), masks=masks, iou_threshold=0.5)

    return arguments


CONTRACTS = [
    Contract(
        function=lambda scores, masks, iou_threshold, backend="auto": mask_nms(
            masks, scores, iou_threshold, backend=backend
        ),
        stock=lambda scores, masks, iou_threshold: brute_force(masks, scores.detach(), iou_threshold).to(masks.device),
        name="mask_nms",
        cases=[
            Case("few objects", nms_case(5)),
            Case("many objects", nms_case(30)),
            Case("one mask", nms_case(1, 1)),
            Case("no masks", nms_case(1, 0)),
        ],
        exact=True,
        compile_whole=False,  # but with max_output: test_the_static_form_compiles_and_exports
    )
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold, kept", [(0.1, [0, 3]), (0.2, [0, 3]), (0.5, [0, 2, 3]), (0.7, [0, 1, 2, 3])])
def test_golden(threshold, kept, backend):
    assert mask_nms(GOLDEN, GOLDEN_SCORES, threshold, backend=backend).tolist() == kept
    assert mask_nms(GOLDEN, GOLDEN_SCORES, 0.5, GOLDEN_LABELS, backend=backend).tolist() == [0, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_iou_equal_to_the_threshold_does_not_suppress(backend):
    """Thresholds in tenths, which binary fractions cannot represent."""
    for tenth in range(1, 10):
        masks = torch.zeros(2, 1, 100, dtype=torch.bool)
        masks[0], masks[1, 0, : 10 * tenth] = True, True
        scores = torch.tensor([0.9, 0.8])
        assert mask_nms(masks, scores, tenth / 10, backend=backend).tolist() == [0, 1]
        assert mask_nms(masks, scores, tenth / 10 - 1e-12, backend=backend).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_rank_by_index(backend):
    masks = ellipses(1, 20, 30).repeat(5, 1, 1)
    scores = torch.tensor([0.5, 0.7, 0.7, 0.5, 0.7])
    assert mask_nms(masks, scores, 0.5, backend=backend).tolist() == [1]
    assert mask_nms(masks, scores, 1.0, backend=backend).tolist() == [1, 2, 4, 0, 3]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_ranks_first_and_empty_masks_suppress_nothing(backend):
    masks = torch.zeros(3, 5, 40, dtype=torch.bool)
    scores = torch.tensor([1.0, torch.nan, torch.inf])
    assert mask_nms(masks, scores, 0.0, backend=backend).tolist() == [1, 2, 0]


@pytest.mark.sanitized
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [ellipses, noise])
def test_widths(make, width, device):
    masks = make(30, 13, width, seed=width)
    scores = torch.rand(30)
    for threshold in (0.0, 0.1, 0.3, 0.5, 0.9):
        found = mask_nms(masks.to(device), scores.to(device), threshold)
        assert torch.equal(found.cpu(), brute_force(masks, scores, threshold))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 200])
def test_labels_and_blocks(count, backend, dtype, device):
    masks = ellipses(count, 40, 50, seed=count, groups=max(1, count // 6))
    scores, labels = torch.rand(count), torch.randint(3, (count,)).to(dtype)
    for threshold in (0.3, 0.7):
        found = mask_nms(masks.to(device), scores.to(device), threshold, labels.to(device), backend=backend)
        assert torch.equal(found.cpu(), brute_force(masks, scores, threshold, labels))


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("room", [0, 1, 3, 7, 40, 100])
def test_the_static_form(room, backend, device):
    masks, scores = ellipses(40, 30, 50, groups=9).to(device), torch.rand(40).to(device)
    full = mask_nms(masks, scores, 0.5, backend=backend)
    keep, count = mask_nms(masks, scores, 0.5, max_output=room, backend=backend)
    assert count.shape == () and count.item() == min(room, len(full)) and keep.shape == (room,)
    assert torch.equal(keep[:count], full[:room]) and (keep[count:] == -1).all()


@pytest.mark.parametrize("count", [0, 1, 40])
def test_the_static_form_compiles_and_exports(count):
    masks, scores = ellipses(count, 30, 50, groups=9), torch.rand(count)

    class Suppression(torch.nn.Module):
        def forward(self, masks, scores):
            return mask_nms(masks, scores, 0.5, max_output=12)

    expected = Suppression()(masks, scores)
    exported = torch.export.export(Suppression(), (masks, scores)).module()
    for program in (torch.compile(Suppression(), fullgraph=True), exported):
        for one, two in zip(program(masks, scores), expected):
            assert torch.equal(one, two)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 80), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**32))
def test_properties(count, groups, threshold, seed):
    masks = ellipses(count, 24, 48, seed=seed, groups=groups)
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()
    kept = mask_nms(masks, scores, threshold)
    assert torch.equal(kept, brute_force(masks, scores, threshold))
    again = mask_nms(masks[kept], scores[kept], threshold)
    assert torch.equal(again, torch.arange(len(kept)))  # kept masks are all kept again
    shuffled = torch.randperm(count)
    assert torch.equal(shuffled[mask_nms(masks[shuffled], scores[shuffled], threshold)], kept)


PACKED = pack_masks(torch.zeros(2, 4, 40).bool())
SCORES = torch.zeros(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mask_nms(SCORES, SCORES, 0.5), RuntimeError, "masks has dtype float32; allowed: bool, uint8"),
        (lambda: mask_nms(None, SCORES, 0.5), TypeError, "masks is NoneType; allowed: PackedMasks, or"),
        (lambda: mask_nms(PACKED, SCORES[:1], 0.5), RuntimeError, r"scores has shape \(1,\); allowed: \(2\) \(one for"),
        (lambda: mask_nms(PACKED, SCORES.int(), 0.5), RuntimeError, "scores has dtype int32"),
        (lambda: mask_nms(PACKED, [1, 2], 0.5), TypeError, "scores is list"),
        (lambda: mask_nms(PACKED, SCORES.to("meta"), 0.5), RuntimeError, "scores is on meta; allowed: cpu"),
        (lambda: mask_nms(PACKED, SCORES, torch.nan), ValueError, "iou_threshold=nan; allowed: 0 to 1"),
        (lambda: mask_nms(PACKED, SCORES, 1.5), ValueError, "iou_threshold=1.5; allowed: 0 to 1"),
        (lambda: mask_nms(PACKED, SCORES, "1"), TypeError, "iou_threshold='1'; allowed: a number"),
        (lambda: mask_nms(PACKED, SCORES, 0.5, SCORES), RuntimeError, "labels has dtype float32; allowed: int64"),
        (lambda: mask_nms(PACKED, SCORES, 0.5, SCORES[:1].long()), RuntimeError, r"labels has shape \(1,\)"),
        (lambda: mask_nms(PACKED, SCORES, 0.5, max_output=-1), ValueError, "max_output=-1; allowed: 0 or more"),
        (lambda: mask_nms(PACKED, SCORES, 0.5, max_output=1.5), TypeError, "max_output=1.5; allowed: an int, or None"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=f"fastseg.ops.mask_nms: {message}"):
        call()


@pytest.mark.sanitized
def test_indices_out_of_range_are_refused():
    """Through torch.ops, with an order that does not come from a sort."""
    packed = PackedMasks(PACKED.words, 40)
    for order in ([0, 2], [-1, 0], [2**62, 0]):
        with pytest.raises(RuntimeError, match="order holds no index of a mask"):
            torch.ops.fastseg.mask_nms(packed.words, packed.area, packed.boxes, torch.tensor(order), None, 0.5, None)
