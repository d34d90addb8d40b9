"""The merge to a panoptic map, against a pixel-by-pixel version."""

import pytest
import torch

from fastseg.models import panoptic_merge
from tests.models.stock_fpn import panoptic_merged


def compare(masks, scores, classes, labels, **limits):
    ours, segments = panoptic_merge(masks, scores, classes, labels, **limits)
    expected, listed = panoptic_merged(masks.numpy(), scores.numpy(), classes.numpy(), labels.numpy(), **limits)
    assert torch.equal(ours, torch.from_numpy(expected).int())
    assert [(s.id, s.is_thing, s.category) for s in segments] == [
        (d["id"], d["isthing"], d["category"]) for d in listed
    ]
    for segment, found in zip(segments, listed):
        assert segment.area == int((ours == segment.id).sum())
        assert segment.score == found.get("score")
        assert segment.is_thing or segment.area == found["area"]
    return ours, segments


def scene(seed, instances=12, height=24, width=30):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(instances, height, width, dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(size - 4, (), generator=generator)) for size in (height, width))
        rows, columns = (int(torch.randint(0, 12, (), generator=generator)) for _ in range(2))
        mask[top : top + rows, left : left + columns] = True
    scores = torch.randint(3, 10, (instances,), generator=generator) / 10  # with equal ones
    classes = torch.randint(1, 80, (instances,), generator=generator)
    return masks, scores, classes, torch.randint(4, (height, width), generator=generator)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [dict(least_area=60), dict(least_area=1, least_score=0.0, most_overlap=0.2)])
def test_equals_the_version_by_pixels(seed, limits):
    _, segments = compare(*scene(seed), **limits)
    assert {True, False} == {segment.is_thing for segment in segments}


def test_of_two_identical_masks_the_better_one_survives():
    masks = torch.zeros(2, 70, 70, dtype=torch.bool)
    masks[:, 10:20, 10:20] = True
    ours, segments = compare(masks, torch.tensor([0.8, 0.9]), torch.tensor([1, 2]), torch.zeros(70, 70).long())
    assert [(segment.category, segment.area) for segment in segments] == [(2, 100)]
    assert ours.count_nonzero() == 100


@pytest.mark.parametrize("area, kept", [(4095, False), (4096, True)])
def test_small_stuff_is_dropped(area, kept):
    labels = torch.zeros(70 * 70, dtype=torch.uint8)
    labels[:area] = 5
    ours, segments = compare(torch.zeros(0, 70, 70, dtype=torch.bool), *torch.zeros(2, 0), labels.view(70, 70))
    assert bool(segments) == kept
    assert ours.count_nonzero() == (area if kept else 0)


def test_half_covered_is_kept_and_more_is_dropped():
    masks = torch.zeros(3, 10, 10, dtype=torch.uint8)
    masks[0, :5] = 1  # 50 pixels
    masks[1, :, 0] = 1  # half of its 10 pixels are covered
    masks[2, :6, 1] = 1  # 5 of its 6
    _, segments = compare(masks, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 2, 3]), torch.zeros(10, 10).long())
    assert [(segment.category, segment.area) for segment in segments] == [(1, 50), (2, 5)]


def test_the_threshold_of_scores_is_kept():
    masks = torch.eye(2).view(2, 1, 2) > 0
    _, segments = compare(masks, torch.tensor([0.5, 0.4999]), torch.tensor([1, 2]), torch.zeros(1, 2).long())
    assert [segment.category for segment in segments] == [1]


def test_arguments_are_not_changed():
    arguments = scene(0)
    copies = [value.clone() for value in arguments]
    panoptic_merge(*arguments)
    assert all(torch.equal(value, copied) for value, copied in zip(arguments, copies))


def test_bad_arguments_are_named():
    masks, scores, classes, labels = scene(0)
    for bad, message in (
        (
            (masks[:, :5], scores, classes, labels),
            r"masks is bool \(12, 5, 30\); allowed: bool or integers \(n, 24, 30\)",
        ),
        ((masks.float(), scores, classes, labels), r"masks is float32 .*; allowed: bool or integers"),
        ((masks, scores[:3], classes, labels), r"scores is float32 \(3,\); allowed: \(12,\), one of each mask"),
        ((masks, scores, classes[:3], labels), r"classes is int64 \(3,\); allowed: \(12,\)"),
        ((masks, scores, classes, labels.float()), r"labels is float32 \(24, 30\); allowed: integers \(H, W\)"),
        ((masks, scores, classes, labels[0]), r"labels is int64 \(30,\); allowed: integers \(H, W\)"),
    ):
        with pytest.raises(ValueError, match=rf"panoptic_merge: {message}"):
            panoptic_merge(*bad)
