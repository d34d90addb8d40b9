"""coco_evaluate of boxes and of masks, similar to COCO's val set: 7 truths and 100 detections per image, 80 categories.
The shape of a case is (images,).

pycocotools takes too long on the 5000 images of that set, so there are fewer here; all times grow linearly with their
number. Peers change their arguments, so each gets a shallow copy; its time includes the copy.
"""

import contextlib
import functools
import importlib
import io

import numpy
import torch

from benchmarks.harness import Case, Peer, Target
from fastseg.metrics import coco_evaluate
from fastseg.metrics.polygons import polygons_to_masks
from fastseg.ops import masks_to_rle

HEIGHT, WIDTH, CATEGORIES = 480, 640, 80
BYTES = {"bbox": 4 * 8, "segm": 200}  # per detection: its box, or the text of its counts


def corners(random, centre, radius):
    """The corners of a polygon near an ellipse, inside the image."""
    angles = numpy.sort(random.uniform(0, 2 * numpy.pi, random.integers(8, 50)))
    length = random.uniform(0.75, 1.1, len(angles))
    points = centre + radius * length[:, None] * numpy.stack([numpy.cos(angles), numpy.sin(angles)], 1)
    return points.clip(0, [WIDTH, HEIGHT]).round(2)


def box_of(points):
    return [*points.min(0).tolist(), *(points.max(0) - points.min(0)).tolist()]


def image_of(random, image, iou_type):
    """Truths and detections of an image: about half of the detections have its categories, some are near a truth."""
    truths, found, polygons = [], [], []
    categories = random.integers(1, CATEGORIES + 1, 3)

    def detect(points, category):
        entry = dict(image_id=image, category_id=category, score=float(random.random()))
        found.append(entry | ({"bbox": box_of(points)} if iou_type == "bbox" else {}))
        polygons.append([points.ravel().tolist()])

    for _ in range(random.poisson(7.3)):
        radius, centre = numpy.exp(random.uniform(1.5, 5, 2)), random.uniform(0, [WIDTH, HEIGHT])
        points, category = corners(random, centre, radius), int(random.choice(categories))
        area = float(polygons_to_masks([[points.ravel().tolist()]], (HEIGHT, WIDTH)).area)
        truths.append(
            dict(
                id=0,
                image_id=image,
                category_id=category,
                bbox=box_of(points),
                area=area,
                iscrowd=0,
                segmentation=[points.ravel().tolist()],
            )
        )
        for _ in range(random.integers(5)):
            near = centre + 0.08 * radius * random.normal(size=2)
            detect(corners(random, near, radius * numpy.exp(0.1 * random.normal(size=2))), category)
    while len(found) < 100:
        kind = int(random.choice(categories) if random.random() < 0.4 else random.integers(1, CATEGORIES + 1))
        radius, centre = numpy.exp(random.uniform(1.5, 4.6, 2)), random.uniform(0, [WIDTH, HEIGHT])
        detect(corners(random, centre, radius), kind)
    if iou_type == "segm":
        for entry, rle in zip(found, masks_to_rle(polygons_to_masks(polygons, (HEIGHT, WIDTH)))):
            entry["segmentation"] = rle | {"counts": rle["counts"].decode()}
    return truths, found


def make(iou_type, shape, device, dtype, layout):
    random = numpy.random.default_rng(0)
    images = range(1, shape[0] + 1)
    truths, detections = zip(*[image_of(random, image, iou_type) for image in images])
    annotations = dict(
        images=[dict(id=image, height=HEIGHT, width=WIDTH) for image in images],
        annotations=[entry | {"id": number} for number, entry in enumerate(sum(truths, []), 1)],
        categories=[dict(id=category, name=str(category)) for category in range(1, CATEGORIES + 1)],
    )
    detections = sum(detections, [])
    return torch.tensor([entry["score"] for entry in detections], dtype=dtype), annotations, detections


def ours(iou_type, scores, annotations, detections):
    return coco_evaluate(annotations, detections, iou_type)


def peer(coco_module, evaluator_module, evaluator, iou_type):
    """The peer of a package with the interface of pycocotools."""
    try:
        coco = importlib.import_module(coco_module).COCO
        evaluate = getattr(importlib.import_module(evaluator_module), evaluator)
    except ImportError as error:
        return Peer(None, missing=str(error))

    def run(scores, annotations, detections):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco()
            truth.dataset = annotations | {"annotations": [dict(entry) for entry in annotations["annotations"]]}
            truth.createIndex()
            evaluation = evaluate(truth, truth.loadRes([dict(entry) for entry in detections]), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return torch.tensor([float(figure) for figure in evaluation.stats[:12]], dtype=torch.float64)

    return Peer(run, devices=("cpu",))


def verify(case, inputs):
    figures = torch.tensor([*case.ours(*inputs).values()], dtype=torch.float64)
    others = [(name, peer.run(*inputs)) for name, peer in case.peers.items() if peer.missing is None]
    wrong = [name for name, expected in others if (figures - expected).abs().max() > 1e-12]
    return f"differs from {', '.join(wrong)}" if wrong else None


def case(iou_type):
    peers = {
        "pycocotools": peer("pycocotools.coco", "pycocotools.cocoeval", "COCOeval", iou_type),
        "faster-coco-eval": peer("faster_coco_eval", "faster_coco_eval", "COCOeval_faster", iou_type),
    }
    targets = Target("speedup", 10, "pycocotools"), Target("speedup", 2, "faster-coco-eval")
    return Case(
        "coco_evaluate", (200,), functools.partial(make, iou_type), functools.partial(ours, iou_type), peers,
        minimal_bytes=lambda shape, dtype: 100 * shape[0] * BYTES[iou_type], verify=verify, name=iou_type,
        dtype=torch.float64, targets=targets, backward=False, devices=("cpu",), quick_shape=(2,),
    )  # fmt: skip


CASES = [case("bbox"), case("segm")]
