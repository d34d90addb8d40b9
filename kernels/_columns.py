"""Shared by the Triton kernels of the softmax losses: labels, weights, a softmax over the classes of a pixel block.

A *column* is the tuple of tiles that holds the logits of BLOCK_P pixels, tile k the classes [k CHUNK, (k + 1)
CHUNK) as (CHUNK, BLOCK_P). Different tiles are combined within a thread, the rows of a tile may lie in
different lanes or warps: CHUNK = 1 for planes (NCHW, a thread owns all classes of its pixels and reads 16
bytes of a plane at once), CHUNK = 8 and up for rows (channels_last, the lanes share a pixel's contiguous
classes).
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Config(NamedTuple):
    """The sizes of a block: CHUNK classes per tile, STEP classes in registers at a time, BLOCK_P pixels."""

    chunk: int
    step: int
    block: int
    warps: int


@triton.jit
def valid_labels(labels, inside, ignore_index, C: tl.constexpr, DEBUG: tl.constexpr):
    """(int32 labels with -1 for every pixel that does not count, which pixels count), from labels of any int type."""
    labels = labels.to(tl.int64)
    known = (labels >= 0) & (labels < C)
    kept = inside & (labels != ignore_index)
    if DEBUG:
        tl.device_assert(known | (kept == 0), "fastseg: a label is outside [0, C) and is not ignore_index")
    valid = kept & known
    return tl.where(valid, labels, -1).to(tl.int32), valid


@triton.jit
def pixel_weights(class_weight, pixel_weight, label, position, valid):
    """(weight of the label, weight of the pixel), 0 where the pixel does not count: (BLOCK_P,) fp32 each."""
    label_weight = tl.where(valid, 1.0, 0.0)
    each = label_weight
    if class_weight is not None:
        label_weight = tl.load(class_weight + label, mask=valid, other=0.0)
    if pixel_weight is not None:
        each = tl.load(pixel_weight + position, mask=valid, other=0.0)
    return label_weight, each


@triton.jit
def chunk_classes(start, k, CHUNK: tl.constexpr):
    """The classes of tile k of a column that starts with class `start`: (CHUNK, 1)."""
    return (start + k * CHUNK + tl.arange(0, CHUNK))[:, None]


@triton.jit
def chunk_weights(class_weight, classes, C: tl.constexpr):
    """Weights of these classes, 1 without class_weight, 0 from C on: (CHUNK, 1)."""
    if class_weight is not None:
        return tl.load(class_weight + classes, mask=classes < C, other=0.0)
    else:
        return tl.where(classes < C, 1.0, 0.0)


@triton.jit
def weight_sum(class_weight, C: tl.constexpr):
    """Sum of the class weights, C without class_weight."""
    if class_weight is not None:
        classes = tl.arange(0, triton.next_power_of_2(C))
        return tl.sum(tl.load(class_weight + classes, mask=classes < C, other=0.0), 0)
    else:
        return C * 1.0


@triton.jit
def read_column(
    pointers, inside, plane, start, C: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr,
    MISSING: tl.constexpr = -float("inf"),
):  # fmt: skip
    """Logits of the classes [start, start + COUNT) as fp32; classes from C on are MISSING, pixels outside are 0.

    pointers, inside: (BLOCK_P,) addresses of class 0, and whether the pixel exists; plane: distance of two classes.
    """
    column = ()
    for offset in tl.static_range(0, COUNT, CHUNK):
        classes = (start + offset + tl.arange(0, CHUNK))[:, None]
        addresses = pointers[None, :] + classes.to(tl.int64) * plane
        if offset + CHUNK > C or (C > COUNT and C % COUNT != 0):
            missing = tl.where(classes < C, 0.0, MISSING).to(pointers.dtype.element_ty)
            tile = tl.load(addresses, mask=inside[None, :] & (classes < C), other=missing)
        else:
            tile = tl.load(addresses, mask=inside[None, :], other=0.0)
        column = column + (tile.to(tl.float32),)
    return column


@triton.jit
def column_max(column):
    """Largest value of each pixel: (BLOCK_P,)."""
    largest = column[0]
    for k in tl.static_range(1, len(column)):
        largest = tl.maximum(largest, column[k])
    return tl.max(largest, 0)


@triton.jit
def column_sum(column):
    """Sum over the classes of each pixel: (BLOCK_P,)."""
    total = column[0]
    for k in tl.static_range(1, len(column)):
        total += column[k]
    return tl.sum(total, 0)


@triton.jit
def exponentials(column, shift):
    """e^(column - shift), with shift (BLOCK_P,)."""
    values = ()
    for k in tl.static_range(len(column)):
        values = values + (tl.exp2((column[k] - shift[None, :]) * LOG2_E),)
    return values


@triton.jit
def weighted_logits(column, start, class_weight, origin, C: tl.constexpr, CHUNK: tl.constexpr):
    """Sum over a column of w_c (logit_c - origin): (BLOCK_P,)."""
    terms = ()
    for k in tl.static_range(len(column)):
        classes = chunk_classes(start, k, CHUNK)
        shifted = tl.where(classes < C, column[k] - origin[None, :], 0.0)  # not 0 times the -inf of a missing class
        terms = terms + (shifted * chunk_weights(class_weight, classes, C),)
    return column_sum(terms)


@triton.jit
def online_softmax(pointers, inside, plane, C: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Maximum and sum of e^(logit - maximum) over any number of classes, from one read of them: (BLOCK_P,) each."""
    largest = tl.where(inside, -float("inf"), 0.0)
    total = tl.zeros_like(largest)
    for start in range(0, C, STEP):
        column = read_column(pointers, inside, plane, start, C, STEP, CHUNK)
        maximum = tl.maximum(largest, column_max(column))
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)  # avoids inf - inf while all logits so far are -inf
        total = total * tl.exp2((largest - shift) * LOG2_E) + column_sum(exponentials(column, shift))
        largest = maximum
    return largest, total
