"""mask_iou: how much masks overlap, as a matrix of all pairs or for given pairs.

    iou(a, b) = |a and b| / |a or b|          ios(a, b) = |a and b| / min(|a|, |b|)          0 / 0 = 0
    intersection(a, b) = |a and b|

A crowd region b (COCO's iscrowd) may hold many objects: its iou(a, b) is |a and b| / |a|, a being the detection.
"""

from typing import Literal

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.mask_iou import reference
from fastseg.ops.masks.pack_masks import packed_from
from fastseg.ops.masks.packed import PackedMasks, check_same_size

_NAME = "mask_iou"
_DENOMINATORS = {"iou": reference.UNION, "ios": reference.SMALLER, "intersection": reference.NOTHING}


def check(words_a, area_a, boxes_a, words_b, area_b, boxes_b, crowd, labels, denominator, pairs):
    check_known(_NAME, words_a, area_a, boxes_a)
    check_known(_NAME, words_b, area_b, boxes_b)
    _check.same_device(_NAME, "b", words_b, "a", words_a)
    _check.shape(_NAME, "b", words_b, ("M", *words_a.shape[1:]), "of the size of a")
    _check.in_range(_NAME, "denominator", denominator, reference.UNION, reference.NOTHING)
    if pairs:
        _check.shape(_NAME, "b", words_b, words_a.shape, "as many masks as a, for pairs")
    if crowd is not None:
        _check.argument(_NAME, "crowd", crowd, (torch.bool,), words_b.shape[:1], like=("a", words_a))
    if labels is not None:
        _check.argument(_NAME, "labels", labels, (torch.int64,), words_a.shape[:1], like=("a", words_a))
        _check.shape(_NAME, "b", words_b, words_a.shape, "as many masks as a, with labels")


def check_known(op, words, area, boxes):
    """Checks the three tensors of packed masks; torch.ops.fastseg.<op> can be called with any."""
    _check.argument(op, "words", words, (torch.int32,), ("N", "H", "words"))
    _check.argument(op, "area", area, (torch.int64,), words.shape[:1], like=("words", words))
    _check.argument(op, "boxes", boxes, (torch.int32,), (words.shape[0], 4), like=("words", words))


def outputs(words_a, words_b, denominator, pairs):
    count = words_a.shape[0]
    dtype = torch.int64 if denominator == reference.NOTHING else torch.float32
    return words_a.new_empty(count if pairs else (count, words_b.shape[0]), dtype=dtype)


# labels [N]: only if b is a; masks of different labels count as disjoint
mask_iou_op = Op(
    "mask_iou(Tensor words_a, Tensor area_a, Tensor boxes_a, Tensor words_b, Tensor area_b, Tensor boxes_b, "
    "Tensor? crowd, Tensor? labels, int denominator, bool pairs) -> Tensor iou",
    check=check,
    outputs=outputs,
    internal=True,
    contiguous=("words_a", "area_a", "boxes_a", "words_b", "area_b", "boxes_b", "crowd", "labels"),
    backends=rows(reference.mask_iou, cpu=(torch.int32,), cuda=(torch.int32,)),
)


def mask_iou(
    a: PackedMasks | Tensor,
    b: PackedMasks | Tensor | None = None,
    *,
    crowd: Tensor | None = None,
    metric: Literal["iou", "ios", "intersection"] = "iou",
    pairs: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The IoU of N masks with M, from exact counts of pixels.

    Args:
        a: N masks of one size: `PackedMasks`, or (N, H, W) of bool or uint8, which is packed first.
        b: M masks of the size of a, on its device. None: a itself; every pair is then counted once.
        crowd: bool (M), masks of b that are crowd regions: the intersection is divided by the area of the mask of a.
            Only with metric="iou".
        metric: "iou"; "ios", the intersection over the area of the smaller mask, 1 where one covers the other; or
            "intersection", the number of pixels that both have.
        pairs: compute only iou(a[i], b[i]); N = M.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        (N, M), or (N) with pairs=True. float32: the quotient of two integers, rounded once, 0 for empty masks; with
        "intersection" int64, exact. Not differentiable.

    Raises:
        RuntimeError: masks of different sizes, numbers or devices, another dtype or shape.
        ValueError: another metric; crowd with one that is not "iou"; pairs without b.
        TypeError: arguments of other types.
    """
    a = packed_from(_NAME, "a", a)
    _check.one_of(_NAME, "metric", metric, tuple(_DENOMINATORS))
    _check.booleans(_NAME, pairs=pairs)
    if b is None:
        if pairs:
            raise ValueError(f"fastseg.ops.{_NAME}: b=None; allowed with pairs=True: masks")
        b = a
    else:
        b = packed_from(_NAME, "b", b)
        check_same_size(_NAME, "b", b, "a", a)
        if pairs and len(a) != len(b):
            raise RuntimeError(f"fastseg.ops.{_NAME}: b holds {len(b)} masks; allowed: {len(a)}, as a, for pairs")
    if crowd is not None:
        if metric != "iou":
            raise ValueError(f"fastseg.ops.{_NAME}: metric={metric!r}; allowed with crowd: 'iou'")
        _check.argument(_NAME, "crowd", crowd, (torch.bool,), (len(b),), like=("b", b.words))
    return mask_iou_op(
        a.words,
        a.area,
        a.boxes,
        b.words,
        b.area,
        b.boxes,
        crowd,
        None,
        _DENOMINATORS[metric],
        pairs,
        backend=backend,
    )
