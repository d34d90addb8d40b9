"""The Triton kernels of the softmax statistics and their gradient: README.md has formulas, ../_columns.py columns."""

import triton
import triton.language as tl

from fastseg.kernels._columns import (
    LOG2_E,
    chunk_classes,
    chunk_weights,
    column_max,
    column_sum,
    exponentials,
    pixel_weights,
    read_column,
    valid_labels,
    weight_sum,
    weighted_logits,
)


@triton.jit
def kept_column(column, valid):
    """The column with 0 for every pixel that does not count, so that its logits have no effect."""
    kept = ()
    for k in tl.static_range(len(column)):
        kept = kept + (tl.where(valid[None, :], column[k], 0.0),)
    return kept


@triton.jit
def fold(tile, PIXEL: tl.constexpr, FOLD: tl.constexpr):
    """(CHUNK, BLOCK_P) -> (CHUNK, BLOCK_P / FOLD): adds the pixels that one thread holds."""
    CHUNK: tl.constexpr = tile.shape[0]
    LANES: tl.constexpr = tile.shape[1] // FOLD
    if FOLD == 1:
        return tile
    elif PIXEL == 1:
        return tl.sum(tl.reshape(tile, (CHUNK, LANES, FOLD)), 2)
    else:
        return tl.sum(tl.reshape(tile, (CHUNK, FOLD, LANES)), 1)


@triton.jit
def nothing(C: tl.constexpr, CHUNK: tl.constexpr, LANES: tl.constexpr):
    """A column of zeros, (CHUNK, LANES) each."""
    zeros = ()
    for _ in tl.static_range(0, C, CHUNK):
        zeros = zeros + (tl.zeros((CHUNK, LANES), tl.float32),)
    return zeros


@triton.jit
def store_class_sums(sums, column, C: tl.constexpr, CHUNK: tl.constexpr):
    """Adds up the lanes of a column and stores one number per class."""
    for k in tl.static_range(len(column)):
        classes = k * CHUNK + tl.arange(0, CHUNK)
        tl.store(sums + classes, tl.sum(column[k], 1), mask=classes < C)


@triton.jit
def softmax_statistics_kernel(
    logits,  # [N, C, P], element (n, c, p) at n * image + c * plane + p * PIXEL
    target,  # [N, P] int64, int32 or uint8
    class_weight,  # [C] or None
    pixel_weight,  # [N, P] or None
    class_sums,  # [N, groups, 3, C] fp32: intersection, prediction, truth
    pixel_sums,  # [N, groups, 2] fp32: numerator, denominator
    pixels, groups, turns, image, plane, ignore_index, label_smoothing,
    C: tl.constexpr, PIXEL: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, FOLD: tl.constexpr,
    SMOOTHING: tl.constexpr, SQUARED: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Statistics of `turns` blocks of BLOCK_P pixels of one image. Grid: (N * groups,)."""
    program = tl.program_id(0).to(tl.int64)
    n = program // groups
    intersection = nothing(C, CHUNK, BLOCK_P // FOLD)
    prediction = nothing(C, CHUNK, BLOCK_P // FOLD)
    BINS: tl.constexpr = triton.next_power_of_2(C)
    truth = tl.zeros((BINS,), tl.int32)
    numerator = tl.zeros((BLOCK_P,), tl.float32)
    denominator = tl.zeros((BLOCK_P,), tl.float32)
    for turn in range(turns):
        first = (program % groups * turns + turn) * BLOCK_P
        p = tl.arange(0, BLOCK_P)
        inside = p < pixels - first
        position = n * pixels + first + p
        label, valid = valid_labels(tl.load(target + position, mask=inside, other=0), inside, ignore_index, C, DEBUG)
        pointers = logits + n * image + first * PIXEL + p * PIXEL
        column = kept_column(read_column(pointers, inside, plane, 0, C, C, CHUNK), valid)
        own = tl.load(pointers + label.to(tl.int64) * plane, mask=valid, other=0.0).to(tl.float32)
        largest = column_max(column)
        values = exponentials(column, largest)
        total = column_sum(values)
        inverse = tl.where(valid, 1.0 / total, 0.0)

        label_weight, each = pixel_weights(class_weight, pixel_weight, label, position, valid)
        log_total = tl.log(total)
        loss = label_weight * ((largest - own) + log_total)
        if SMOOTHING:
            uniform = weight_sum(class_weight, C) * log_total - weighted_logits(
                column, 0, class_weight, largest, C, CHUNK
            )
            loss = (1.0 - label_smoothing) * loss + label_smoothing / C * uniform
        numerator += tl.where(valid, each * loss, 0.0)
        denominator += each * label_weight

        new_intersection = ()
        new_prediction = ()
        for k in tl.static_range(len(values)):
            probability = values[k] * inverse[None, :]
            mine = chunk_classes(0, k, CHUNK) == label[None, :]
            predicted = probability * probability if SQUARED else probability
            new_intersection = new_intersection + (
                intersection[k] + fold(tl.where(mine, probability, 0.0), PIXEL, FOLD),
            )
            new_prediction = new_prediction + (prediction[k] + fold(predicted, PIXEL, FOLD),)
        intersection = new_intersection
        prediction = new_prediction
        truth += tl.histogram(tl.where(valid, label, 0), BINS, mask=valid)
    store_class_sums(class_sums + program * 3 * C, intersection, C, CHUNK)
    store_class_sums(class_sums + program * 3 * C + C, prediction, C, CHUNK)
    bins = tl.arange(0, BINS)
    tl.store(class_sums + program * 3 * C + 2 * C + bins, truth.to(tl.float32), mask=bins < C)
    tl.store(pixel_sums + 2 * program, tl.sum(numerator, 0))
    tl.store(pixel_sums + 2 * program + 1, tl.sum(denominator, 0))


@triton.jit
def prediction_slope(slopes, classes, stride, probability, C: tl.constexpr, SQUARED: tl.constexpr):
    """The part of the prediction sums in the gradient of p: their gradients times 2 p, or 1 for linear sums."""
    slope = tl.load(slopes + classes * stride, mask=classes < C, other=0.0).to(tl.float32)
    return 2.0 * slope * probability if SQUARED else slope


@triton.jit
def finish_statistics_kernel(
    class_sums,  # [N, groups, 3, C] fp32
    pixel_sums,  # [N * groups, 2] fp32
    intersection, prediction, truth,  # [N, C] fp64
    numerator, denominator,  # [] fp64
    images, groups, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the sums of all programs, always in the same order. Grid: (N, ceil(3 C / COLUMNS))."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column < 3 * C
    totals = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, groups, ROWS):
        group = start + tl.arange(0, ROWS)
        places = class_sums + (n * groups + group[:, None]) * 3 * C + column[None, :]
        sums = tl.load(places, mask=(group < groups)[:, None] & wanted[None, :], other=0.0)
        totals += tl.sum(sums.to(tl.float64), 0)
    place = n * C + column % C
    tl.store(intersection + place, totals, mask=wanted & (column // C == 0))
    tl.store(prediction + place, totals, mask=wanted & (column // C == 1))
    tl.store(truth + place, totals, mask=wanted & (column // C == 2))
    if tl.program_id(0) + tl.program_id(1) == 0:
        numerators = tl.zeros((ROWS * COLUMNS,), tl.float64)
        denominators = tl.zeros((ROWS * COLUMNS,), tl.float64)
        for start in range(0, images * groups, ROWS * COLUMNS):
            program = start + tl.arange(0, ROWS * COLUMNS)
            inside = program < images * groups
            numerators += tl.load(pixel_sums + 2 * program, mask=inside, other=0.0).to(tl.float64)
            denominators += tl.load(pixel_sums + 2 * program + 1, mask=inside, other=0.0).to(tl.float64)
        tl.store(numerator, tl.sum(numerators, 0))
        tl.store(denominator, tl.sum(denominators, 0))


@triton.jit
def softmax_statistics_backward_kernel(
    logits,  # [N, C, P], element (n, c, p) at n * image + c * plane + p * PIXEL
    target,  # [N, P] int64, int32 or uint8
    class_weight,  # [C] or None
    pixel_weight,  # [N, P] or None
    grad_intersection,  # [N, C] fp64, strides intersection_image, intersection_class
    grad_prediction,  # [N, C] fp64, strides prediction_image, prediction_class
    grad_numerator,  # [] fp64
    gradient,  # [N, C, P], strides gradient_image, gradient_plane, GRADIENT_PIXEL
    pixels, blocks, image, plane, gradient_image, gradient_plane,
    intersection_image, intersection_class, prediction_image, prediction_class, ignore_index, label_smoothing,
    C: tl.constexpr, PIXEL: tl.constexpr, GRADIENT_PIXEL: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
    SMOOTHING: tl.constexpr, SQUARED: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_P pixels of one image. Grid: (N * blocks,).

    With y one-hot, i and d the gradients of intersection and prediction, h = y i + d (2 p, or 1 for linear
    sums): p (h - sum p h) + cross-entropy part, which is a p - t y - u w_c with one number a, t, u per pixel.
    """
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    inside = p < pixels - first
    position = n * pixels + first + p
    label, valid = valid_labels(tl.load(target + position, mask=inside, other=0), inside, ignore_index, C, DEBUG)
    pointers = logits + n * image + first * PIXEL + p * PIXEL
    column = kept_column(read_column(pointers, inside, plane, 0, C, C, CHUNK), valid)
    own = tl.load(pointers + label.to(tl.int64) * plane, mask=valid, other=0.0).to(tl.float32)
    largest = column_max(column)
    values = exponentials(column, largest)
    inverse = tl.where(valid, 1.0 / column_sum(values), 0.0)

    label_weight, each = pixel_weights(class_weight, pixel_weight, label, position, valid)
    scale = each * tl.load(grad_numerator).to(tl.float32)
    target_share = scale * label_weight
    probability_share = target_share
    uniform_share = tl.zeros_like(scale)
    if SMOOTHING:
        uniform_share = scale * (label_smoothing / C)
        target_share *= 1.0 - label_smoothing
        probability_share = target_share + uniform_share * weight_sum(class_weight, C)

    # The label's own gradient once per pixel, with its large terms subtracted before they are rounded by a product.
    own_probability = tl.exp2((own - largest) * LOG2_E) * inverse
    places = grad_intersection + n * intersection_image + label * intersection_class
    own_intersection = tl.load(places, mask=valid, other=0.0).to(tl.float32)
    slopes = grad_prediction + n * prediction_image
    own_prediction = tl.load(slopes + label * prediction_class, mask=valid, other=0.0).to(tl.float32)
    own_prediction = 2.0 * own_prediction * own_probability if SQUARED else own_prediction
    products = ()
    for k in tl.static_range(len(values)):
        probability = values[k] * inverse[None, :]
        slope = prediction_slope(slopes, chunk_classes(0, k, CHUNK), prediction_class, probability, C, SQUARED)
        products = products + (probability * slope,)
    mean_slope = column_sum(products) + own_probability * own_intersection
    own_slope = own_prediction + own_intersection - mean_slope
    own_result = own_probability * (own_slope + probability_share) - target_share
    shift = probability_share - mean_slope

    targets = gradient + n * gradient_image + first * GRADIENT_PIXEL + p * GRADIENT_PIXEL
    for k in tl.static_range(len(values)):
        classes = chunk_classes(0, k, CHUNK)
        probability = values[k] * inverse[None, :]
        slope = prediction_slope(slopes, classes, prediction_class, probability, C, SQUARED)
        result = tl.where(classes == label[None, :], own_result[None, :], probability * (slope + shift[None, :]))
        if SMOOTHING:
            result -= chunk_weights(class_weight, classes, C) * uniform_share[None, :]
        addresses = targets[None, :] + classes.to(tl.int64) * gradient_plane
        tl.store(addresses, result.to(gradient.dtype.element_ty), mask=inside[None, :] & (classes < C))
