"""fastseg.metrics.CocoEvaluator: equal to coco_evaluate for any batches, forms of masks, and ranks."""

import os

import numpy
import pytest
import torch

from fastseg.metrics import CocoEvaluator, coco_evaluate
from fastseg.metrics.polygons import polygons_to_masks
from fastseg.ops import PackedMasks, pack_masks, rle_to_masks, unpack_masks
from tests.coco_data import random_data_set, with_masks

SIZE = (330, 400)


def exact_boxes(annotations, detections):
    """Boxes with corners that are exact in float32, and areas that are not those of the boxes."""
    for entry in (*annotations["annotations"], *detections):
        entry["bbox"] = [float(round(value)) for value in entry["bbox"]]
    return annotations, detections


def tensors_of(annotations, detections, form="packed"):
    """Batches of one image each: id, detections, truths."""
    for image in annotations["images"]:
        parts = []
        for entries, kind in ((detections, "scores"), (annotations["annotations"], "area")):
            own = [entry for entry in entries if entry["image_id"] == image["id"]]
            part = {
                "labels": torch.tensor([entry["category_id"] for entry in own], dtype=torch.int64),
                kind: torch.tensor([entry[kind.rstrip("s")] for entry in own], dtype=torch.float64),
            }
            if kind == "area":
                part["iscrowd"] = torch.tensor([entry["iscrowd"] for entry in own])
            if not own or "segmentation" in own[0]:
                part["masks"] = masks_of([entry["segmentation"] for entry in own], form)
            if not own or "bbox" in own[0]:
                boxes = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float64).view(-1, 4)
                part["boxes"] = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            parts.append(part)
        yield image["id"], *parts


def masks_of(segmentations, form):
    found = [pack_masks(torch.zeros(0, *SIZE, dtype=torch.bool))]
    for each in segmentations:
        found.append(polygons_to_masks([each], SIZE) if isinstance(each, list) else rle_to_masks(each))
    packed = PackedMasks.cat(found)
    return packed if form == "packed" else unpack_masks(packed, torch.bool if form == "bool" else torch.uint8)


def evaluated(batches, iou_type, with_ids=True, **options):
    evaluator = CocoEvaluator(iou_type, **options)
    for image, found, real in batches:
        evaluator.update([found], [real], [image] if with_ids else None)
    return evaluator.compute()


def equal(ours, expected):
    assert dict(ours) == dict(expected)
    for category, figures in ours.per_class.items():
        assert figures == expected.per_class[category]


@pytest.mark.parametrize("use_categories", [True, False])
@pytest.mark.parametrize("iou_type, form", [("bbox", ""), ("segm", "packed"), ("segm", "bool"), ("segm", "uint8")])
def test_equals_coco_evaluate(iou_type, form, use_categories):
    data = exact_boxes(*random_data_set(3, images=8, categories=3))
    if iou_type == "segm":
        data = with_masks(*data, size=SIZE)
    expected = coco_evaluate(*data, iou_type, use_categories=use_categories)
    assert expected["AP"] > 0.01
    batches = [*tensors_of(*data, form)]
    equal(evaluated(batches, iou_type, use_categories=use_categories), expected)
    equal(evaluated(batches, iou_type, with_ids=False, use_categories=use_categories), expected)
    equal(evaluated(batches[::-1], iou_type, use_categories=use_categories), expected)


def test_batches_of_many_images_on_the_device(device):
    data = with_masks(*random_data_set(5, images=6, categories=2), size=SIZE)
    images, *parts = zip(*tensors_of(*data))
    moved = [[{name: value.to(device) for name, value in entry.items()} for entry in part] for part in parts]
    evaluator = CocoEvaluator("segm")
    evaluator.update(moved[0][:4], moved[1][:4], images[:4])
    evaluator.update(moved[0][4:], parts[1][4:], torch.tensor(images[4:]))
    equal(evaluator.compute(), coco_evaluate(*data, "segm"))
    evaluator.reset()
    assert set(evaluator.compute().values()) == {-1.0}


def test_areas_default_to_those_of_boxes_and_masks():
    entry = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0, 0, 20, 20.0]])}
    entry["masks"] = torch.zeros(1, 50, 50, dtype=torch.bool)
    entry["masks"][0, :40, :40] = True
    for iou_type, size in (("bbox", "s"), ("segm", "m")):
        evaluator = CocoEvaluator(iou_type)
        evaluator.update([entry | {"scores": torch.tensor([0.5])}], [entry])
        figures = evaluator.compute()
        assert figures["AP"] == pytest.approx(1.0) and [figures[f"AR{name}"] for name in "sml"].count(-1.0) == 2
        assert figures[f"AR{size}"] == 1.0


def test_thresholds_are_compared_in_double():
    """3 / 4 is reached, 0.7499999999 is not, though in float32 they are the same."""
    whole = torch.ones(1, 4096, 4096, dtype=torch.bool)
    part = whole.clone()
    part[0, :1024] = False
    scores, labels = torch.tensor([0.5]), torch.tensor([1])
    figures = []
    for more in (False, True):
        part[0, 1024, 0] = not more
        evaluator = CocoEvaluator("segm")
        found = dict(masks=pack_masks(part), scores=scores, labels=labels)
        evaluator.update([found], [dict(masks=whole, labels=labels)])
        figures.append(evaluator.compute()["AP75"])
    assert figures == pytest.approx([1.0, 0.0])


def test_nothing():
    nothing = dict(labels=torch.tensor([]), boxes=torch.tensor([]))
    evaluator = CocoEvaluator()
    assert set(evaluator.compute().values()) == {-1.0}
    evaluator.update([], [])
    evaluator.update([nothing | {"scores": torch.tensor([])}], [nothing])
    assert set(evaluator.all_gather().compute().values()) == {-1.0}
    empty = dict(labels=torch.tensor([]), masks=torch.zeros(0, 3, 4, dtype=torch.bool))
    one = dict(labels=torch.tensor([1]), masks=torch.ones(1, 5, 5, dtype=torch.uint8))
    evaluator = CocoEvaluator("segm")
    evaluator.update([empty | {"scores": torch.tensor([])}], [one])
    assert evaluator.compute()["AP"] == 0.0


FOUND = dict(boxes=torch.ones(2, 4), labels=torch.tensor([1, 1]), scores=torch.tensor([0.5, 0.6]))
REAL = dict(boxes=torch.ones(1, 4), labels=torch.tensor([1]))
MASKS = FOUND | dict(masks=torch.zeros(2, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda e: e.update([FOUND], []),
            "detections of 1 images, truths of 0, image_ids of 0; allowed: as many of each",
        ),
        (lambda e: e.update([FOUND], [REAL], [1, 2]), "image_ids of 2"),
        (lambda e: e.update([FOUND], [REAL], ["a"]), r"image_ids=\['a'\]; allowed: an int"),
        (lambda e: e.update([FOUND], [REAL], [2**70]), "image_ids=.*; allowed: an int of 64 bits"),
        (lambda e: e.update([FOUND] * 2, [REAL] * 2, [3, 3]), "image 3 was given before; allowed: each once"),
        (lambda e: (e.update([FOUND], [REAL], [3]), e.update([FOUND], [REAL])), "given for some batches"),
        (lambda e: e.update([{}], [REAL]), "detections of image 0 have no 'boxes'"),
        (lambda e: e.update([FOUND], [5]), "truths of image 0 have no 'boxes'"),
        (lambda e: e.update([FOUND], [{"boxes": torch.ones(1, 4)}]), "truths of image 0 have no 'labels'"),
        (lambda e: e.update([FOUND | {"boxes": torch.ones(2, 5)}], [REAL]), r"'boxes' .* \(2, 5\); allowed: \(n, 4\)"),
        (lambda e: e.update([FOUND | {"labels": torch.ones(2)}], [REAL]), "'labels' .* dtype float32; allowed: int"),
        (lambda e: e.update([FOUND | {"labels": torch.tensor([1])}], [REAL]), r"'labels' .* \(1,\); allowed: \(2,\)"),
        (lambda e: e.update([FOUND | {"scores": torch.tensor([0.1, float("nan")])}], [REAL]), "score that is NaN"),
        (lambda e: e.update([FOUND], [REAL | {"iscrowd": torch.tensor([0, 1])}]), r"'iscrowd' of truths .* \(2,\)"),
        (lambda e: CocoEvaluator("mask"), "iou_type='mask'; allowed: bbox, segm"),
        (lambda e: CocoEvaluator(max_detections=(3, 2)), "rising"),
        (lambda e: CocoEvaluator("segm").update([MASKS], [REAL]), "truths of image 0 have no 'masks'"),
        (
            lambda e: CocoEvaluator("segm").update(
                [MASKS], [REAL | {"masks": torch.zeros(1, 4, 6, dtype=torch.uint8)}]
            ),
            "masks of detections of image 0 are 4 x 5; allowed: 4 x 6, as those of truths",
        ),
        (
            lambda e: CocoEvaluator("segm").update([FOUND | {"masks": torch.zeros(2, 4, 5)}], [REAL]),
            "'masks' of detections of image 0 has shape .* float32; allowed: .* or PackedMasks",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"fastseg.metrics.*{message}"):
        call(CocoEvaluator())


def test_a_batch_with_an_error_is_left_out():
    evaluator = CocoEvaluator()
    with pytest.raises(ValueError):
        evaluator.update([FOUND, {}], [REAL, REAL])
    evaluator.update([FOUND, FOUND], [REAL, REAL])
    assert len(evaluator._tables) == 2


def _rank(rank: int, ranks: int, folder: str) -> None:
    """Images are distributed as by a sampler; the last rank gets none; with ids, rank 1 also gets the first one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    found = {}
    for with_ids in (True, False):
        batches = [*tensors_of(*_data())]
        own = batches[rank :: ranks - 1] if rank < ranks - 1 else []
        evaluator = CocoEvaluator("segm")
        for image, found_here, real in own + batches[:1] * (with_ids and rank == 1):
            evaluator.update([found_here], [real], [image] if with_ids else None)
        evaluator.all_gather()
        found[with_ids] = dict(evaluator.all_gather().compute())
        assert len(evaluator._tables) == len(own) + (with_ids and rank == 1)
    evaluator = CocoEvaluator()
    if rank < 2:
        evaluator.update([FOUND], [REAL], [3] if rank == 0 else None)
    with pytest.raises(ValueError, match="given on some ranks; allowed: on all, or on none"):
        evaluator.all_gather()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def _data():
    return with_masks(*random_data_set(9, images=7, categories=2), size=SIZE)


@pytest.mark.slow
def test_ranks_together_equal_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, (3, str(tmp_path)), nprocs=3)
    expected = dict(coco_evaluate(*_data(), "segm"))
    for rank in range(3):
        assert torch.load(tmp_path / f"{rank}.pt") == {True: expected, False: expected}
    assert numpy.isfinite([*expected.values()]).all()
