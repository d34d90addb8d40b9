"""Random data sets in COCO's structures."""

import numpy

from fastseg.metrics.polygons import polygons_to_masks
from fastseg.ops import masks_to_rle


def annotation(number, image, box, category=1, area=None, crowd=0):
    return dict(
        id=number,
        image_id=image,
        category_id=category,
        bbox=list(box),
        iscrowd=crowd,
        area=box[2] * box[3] if area is None else area,
    )


def detection(image, box, score, category=1):
    return dict(image_id=image, category_id=category, bbox=list(box), score=score)


def data_set(annotations, images, categories=(1,)):
    return dict(
        images=[{"id": image} for image in images],
        annotations=annotations,
        categories=[{"id": category, "name": str(category)} for category in categories],
    )


GOLDEN = data_set(
    [
        annotation(1, 1, (10, 10, 40, 40)),
        annotation(2, 1, (60, 60, 20, 20)),
        annotation(3, 2, (0, 0, 50, 50)),
        annotation(4, 2, (50, 0, 50, 100), crowd=1),
    ],
    images=(1, 2),
)
GOLDEN_DETECTIONS = [
    detection(1, (12, 10, 40, 40), 0.9),
    detection(1, (60, 60, 20, 30), 0.8),
    detection(1, (11, 10, 40, 40), 0.7),
    detection(2, (55, 5, 20, 20), 0.95),
    detection(2, (0, 0, 50, 40), 0.6),
]


def random_data_set(seed, images=30, categories=5, truths=6, found=12, ties=True):
    """Truths of all sizes, some of them crowds; detections near them and elsewhere, with scores that often tie."""
    random = numpy.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(1, images + 1):
        for _ in range(random.integers(truths + 1)):
            side = numpy.exp(random.uniform(numpy.log(8), numpy.log(200), 2))
            box = numpy.concatenate([random.uniform(0, 300, 2), side]).round(2).tolist()
            category, crowd = int(random.integers(1, categories + 1)), int(random.random() < 0.15)
            area = box[2] * box[3] * random.uniform(0.5, 1.0)
            annotations.append(annotation(len(annotations) + 1, image, box, category, area, crowd))
            for _ in range(random.integers(4)):
                near = (numpy.array(box) + random.normal(0, 0.1, 4) * [*side, *side]).round(2)
                near[2:] = numpy.maximum(near[2:], 1)
                score = float(random.random().__round__(1 if ties else 9))
                kind = category if random.random() < 0.9 else int(random.integers(1, categories + 1))
                detections.append(detection(image, near.tolist(), score, kind))
        for _ in range(random.integers(found + 1)):
            box = numpy.concatenate([random.uniform(0, 300, 2), random.uniform(4, 120, 2)]).round(2).tolist()
            score = float(random.random().__round__(1 if ties else 9))
            detections.append(detection(image, box, score, int(random.integers(1, categories + 1))))
    random.shuffle(detections)
    return data_set(annotations, range(1, images + 1), range(1, categories + 1)), detections


def with_masks(annotations, detections, seed=0, size=(330, 400)):
    """The same with a "segmentation" for each instance, roughly an ellipse in its box, in all forms of COCO: polygons
    (one, or two halves), counts, and counts as text; crowds and detections have counts only. Removes the boxes of the
    detections.
    """
    random = numpy.random.default_rng(seed)

    def polygon(box):
        x, y, width, height = box
        angles = numpy.sort(random.uniform(0, 2 * numpy.pi, random.integers(12, 40)))
        radius = random.uniform(0.45, 0.55, (len(angles), 1))
        points = [x + width / 2, y + height / 2] + radius * [width, height] * numpy.stack(
            [numpy.cos(angles), numpy.sin(angles)], 1
        )
        return points.clip(0, [size[1], size[0]]).round(2).ravel().tolist()

    def segmentation(box, kinds):
        kind = kinds[random.integers(len(kinds))]
        halves = [polygon([box[0], box[1], box[2] / 2, box[3]]), polygon([box[0] + box[2] / 3, box[1], box[2], box[3]])]
        polygons = halves if random.random() < 0.2 else [polygon(box)]
        if kind == "polygons":
            return polygons
        rle = masks_to_rle(polygons_to_masks([polygons], size), compressed=kind != "list")[0]
        return rle | {"counts": rle["counts"].decode()} if kind == "str" else rle

    truths = [
        entry | {"segmentation": segmentation(entry["bbox"], KINDS[entry["iscrowd"] :])}
        for entry in annotations["annotations"]
    ]
    found = [entry | {"segmentation": segmentation(entry["bbox"], KINDS[2:])} for entry in detections]
    images = [image | {"height": size[0], "width": size[1]} for image in annotations["images"]]
    for entry in found:
        del entry["bbox"]
    return annotations | {"images": images, "annotations": truths}, found


KINDS = ("polygons", "list", "str", "bytes")
