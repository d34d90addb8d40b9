"""The two Triton kernels of the upsample losses; grids, formulas, byte counts in README.md, launchers in triton.py.

The sampling rule is in ../_cells.py, labels and weights in ../_columns.py. Logits are held in units of log 2, so
that exponentials are powers of two. Tiles are (CHUNK classes, ROWS, lanes): a thread owns a lane, all rows and classes.
"""

import triton
import triton.language as tl

from fastseg.kernels._cells import blend, first_output, neighbours, sample, source_rows
from fastseg.kernels._columns import pixel_weights, valid_labels, weight_sum

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Not specialised on 1 or on divisibility: addresses would gain nothing, and every new size would be compiled anew.
INTEGERS = (
    "image", "plane", "row", "column", "source_height", "source_width", "height", "width", "row_numerator",
    "row_denominator", "column_numerator", "column_denominator", "row_chunks",
)  # fmt: skip
SOFTMAX_INTEGERS = (*INTEGERS, "column_blocks", "ignore_index")
GRADIENT_INTEGERS = (
    *INTEGERS, "column_chunks", "ignore_index", "gradient_image", "gradient_plane", "gradient_row", "gradient_column",
    "strips", "tiles",
)  # fmt: skip


@triton.jit
def chunk_of_classes(start, C: tl.constexpr, CHUNK: tl.constexpr):
    """(classes, classes to read): (CHUNK,) each; the last class is read again in place of those from C on."""
    classes = start + tl.arange(0, CHUNK)
    return classes, tl.minimum(classes, C - 1)


@triton.jit
def upsampled(image_pointer, plane, classes, top, bottom, left, right, row_fraction, column_fraction):
    """Upsampled logits in units of log 2: (CHUNK, ROWS, LANES)."""
    planes = image_pointer + classes.to(tl.int64)[:, None] * plane
    upper, lower = source_rows(planes, top, bottom, left[None, :], right[None, :], column_fraction[None, :])
    return blend((upper * LOG2_E)[:, None, :], (lower * LOG2_E)[:, None, :], row_fraction[None, :, None])


@triton.jit
def class_values(values, classes, C: tl.constexpr):
    """values[classes] as fp32, 0 from C on; 1 where there are no values: (CHUNK, 1, 1)."""
    if values is not None:
        found = tl.load(values + classes, mask=classes < C, other=0.0).to(tl.float32)
    else:
        found = tl.where(classes < C, 1.0, 0.0)
    return found[:, None, None]


@triton.jit
def weights_of_pixels(class_weight, pixel_weight, label, origin, offset, valid):
    """(weight of the label, weight of the pixel), 0 where the pixel does not count; offsets from a 64-bit origin."""
    if pixel_weight is not None:
        pixel_weight += origin
    return pixel_weights(class_weight, pixel_weight, label, offset, valid)


@triton.jit(do_not_specialize=SOFTMAX_INTEGERS)
def upsample_softmax_kernel(
    input,  # [N, C, h, w], any strides
    target,  # [N, H, W] int64, int32 or uint8
    class_weight,  # [C] fp32, or None
    pixel_weight,  # [N, H, W] fp32, or None
    losses,  # [N, H, W] fp32, or None
    sums,  # [2, programs] fp32: numerator, denominator; or None
    class_sums,  # [programs, 3, C] fp32: intersection, prediction, truth; or None
    log_total,  # [N, H, W] fp32: log2 of the sum of exponentials; or None
    grad_intersection,  # [N, C] fp64, or None
    grad_prediction,  # [N, C] fp64, or None
    mean_gradient,  # [N, H, W] fp32: sum over c of probability_c dice gradient_c; or None
    image, plane, row, column,
    source_height, source_width, height, width,
    row_numerator, row_denominator, column_numerator, column_denominator,
    row_chunks, column_blocks, ignore_index, label_smoothing,
    C: tl.constexpr, HALF: tl.constexpr, ROW_SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr,
    SMOOTHING: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Grid: (N * (h + 1) * row_chunks * column_blocks,), column blocks fastest. One pass over the classes by an online
    softmax, a second one if class sums are wanted. Programs without pixels write zero sums."""
    program = tl.program_id(0)
    block = program % column_blocks
    row_chunk = program // column_blocks % row_chunks
    cell = program // (column_blocks * row_chunks) % (source_height + 1)
    n = (program // (column_blocks * row_chunks) // (source_height + 1)).to(tl.int64)

    first = first_output(cell, source_height, height, row_numerator, row_denominator, HALF) + row_chunk * ROWS
    last = first_output(cell + 1, source_height, height, row_numerator, row_denominator, HALF)
    y = first + tl.arange(0, ROWS)
    x = block * COLUMNS + tl.arange(0, COLUMNS)
    _, row_fraction = sample(y, source_height, row_numerator, row_denominator, HALF)
    column_cell, column_fraction = sample(x, source_width, column_numerator, column_denominator, HALF)
    top, bottom = neighbours(cell, source_height, ROW_SPAN)
    left, right = neighbours(column_cell, source_width, COLUMN_SPAN)
    top, bottom, left, right = top * row, bottom * row, left * column, right * column
    image_pointer = input + n * image

    inside = (y < last)[:, None] & (x < width)[None, :]
    origin = (n * height + first) * width
    offset = tl.arange(0, ROWS)[:, None] * width + x[None, :]
    labels = tl.load(target + origin + offset, mask=inside, other=0)
    label, valid = valid_labels(labels, inside, ignore_index, C, DEBUG)
    label_weight, each = weights_of_pixels(class_weight, pixel_weight, label, origin, offset, valid)

    largest = tl.full((ROWS, COLUMNS), -float("inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    weighted = tl.zeros((ROWS, COLUMNS), tl.float32)  # of the smoothing: sum of w_c logit_c
    dice = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, CHUNK):
        classes, read = chunk_of_classes(start, C, CHUNK)
        logits = upsampled(image_pointer, plane, read, top, bottom, left, right, row_fraction, column_fraction)
        if C % CHUNK != 0:
            logits = tl.where((classes < C)[:, None, None], logits, -float("inf"))
        maximum = tl.maximum(largest, tl.max(logits, 0))
        exponentials = tl.exp2(logits - maximum[None, :, :])
        shrink = tl.exp2(largest - maximum)
        total = total * shrink + tl.sum(exponentials, 0)
        if SMOOTHING:
            weights = class_values(class_weight, classes, C)
            weighted += tl.sum(tl.where((classes < C)[:, None, None], logits * weights, 0.0), 0)
        if mean_gradient is not None:
            outer = class_values(grad_prediction + n * C, classes, C)
            if SQUARED:
                dice = dice * (shrink * shrink) + tl.sum(exponentials * exponentials * outer, 0)
            else:
                dice = dice * shrink + tl.sum(exponentials * outer, 0)
        largest = maximum
    log_sum = tl.log2(total)

    # the label's own logit, by the same arithmetic
    own_pointer = image_pointer + tl.maximum(label, 0).to(tl.int64) * plane
    upper, lower = source_rows(own_pointer, top, bottom, left[None, :], right[None, :], column_fraction[None, :])
    own = blend(upper * LOG2_E, lower * LOG2_E, row_fraction[:, None])

    loss = label_weight * ((largest - own) + log_sum) * LN_2
    if SMOOTHING:
        uniform = (weight_sum(class_weight, C) * (largest + log_sum) - weighted) * LN_2
        loss = (1.0 - label_smoothing) * loss + label_smoothing / C * uniform
    loss = tl.where(valid, loss * each, 0.0)
    if losses is not None:
        tl.store(losses + origin + offset, loss, mask=inside)
    if sums is not None:
        tl.store(sums + program, tl.sum(loss))
        tl.store(sums + tl.num_programs(0) + program, tl.sum(tl.where(valid, each * label_weight, 0.0)))
    if log_total is not None:
        tl.store(log_total + origin + offset, largest + log_sum, mask=inside)
    if mean_gradient is not None:
        mean = 2.0 * dice / (total * total) if SQUARED else dice / total
        own_probability = tl.exp2((own - largest) - log_sum)
        mean += own_probability * tl.load(grad_intersection + n * C + label, mask=valid, other=0.0).to(tl.float32)
        tl.store(mean_gradient + origin + offset, mean, mask=inside)
    if class_sums is not None:
        for start in range(0, C, CHUNK):
            classes, read = chunk_of_classes(start, C, CHUNK)
            logits = upsampled(image_pointer, plane, read, top, bottom, left, right, row_fraction, column_fraction)
            probability = tl.exp2(logits - (largest + log_sum)[None, :, :])
            probability = tl.where(valid[None, :, :], probability, 0.0)
            true = label[None, :, :] == classes[:, None, None]
            predicted = probability * probability if SQUARED else probability
            place = class_sums + program.to(tl.int64) * (3 * C) + classes
            exists = classes < C
            tl.store(place, tl.sum(tl.sum(tl.where(true, probability, 0.0), 1), 1), mask=exists)
            tl.store(place + C, tl.sum(tl.sum(predicted, 1), 1), mask=exists)
            tl.store(place + 2 * C, tl.sum(tl.sum(true.to(tl.float32), 1), 1), mask=exists)


@triton.jit
def cell_weights(cell, fraction, source):
    """The weights of an output in source element `cell` - 1 and in element `cell`.

    The first cell has no element before it: all goes to the first element. In the last cell all goes to the last one.
    """
    to_next = tl.where(cell == 0, 1.0, tl.where(cell == source, 0.0, fraction))
    return 1.0 - to_next, to_next


@triton.jit
def add_lanes(values, weight, CHUNK: tl.constexpr, CELLS: tl.constexpr, LANES: tl.constexpr):
    """Weighted sum over the lanes of every cell: (CHUNK, CELLS * LANES) to (CHUNK, CELLS)."""
    return tl.sum(tl.reshape(values * weight[None, :], (CHUNK, CELLS, LANES)), 2)


@triton.jit
def to_sources(before, after, CHUNK: tl.constexpr, CELLS: tl.constexpr):
    """Source element s is the sum of what cell s adds to the element after it and cell s + 1 to the one before it.

    before, after, result: (CHUNK, CELLS); the last column of the result lacks the next tile's part and is not used.
    """
    next_cell = tl.minimum(tl.arange(0, CELLS) + 1, CELLS - 1)
    return after + tl.gather(before, tl.broadcast_to(next_cell[None, :], (CHUNK, CELLS)), 1)


@triton.jit(do_not_specialize=GRADIENT_INTEGERS)
def upsample_gradient_kernel(
    input,  # [N, C, h, w], any strides
    target,  # [N, H, W] int64, int32 or uint8
    class_weight,  # [C] fp32, or None
    pixel_weight,  # [N, H, W] fp32, or None
    grad_losses,  # [N, H, W] fp32, or None for 1
    grad_numerator,  # [] fp64, or None for 1
    log_total,  # [N, H, W] fp32, of upsample_softmax_kernel
    grad_intersection,  # [N, C] fp64, or None
    grad_prediction,  # [N, C] fp64, or None
    mean_gradient,  # [N, H, W] fp32, of upsample_softmax_kernel; None without Dice
    gradient,  # [N, C, h, w], any strides
    image, plane, row, column,
    gradient_image, gradient_plane, gradient_row, gradient_column,
    source_height, source_width, height, width,
    row_numerator, row_denominator, column_numerator, column_denominator,
    row_chunks, column_chunks, strips, tiles, ignore_index, label_smoothing,
    C: tl.constexpr, HALF: tl.constexpr, ROW_SPAN: tl.constexpr, COLUMN_SPAN: tl.constexpr,
    SMOOTHING: tl.constexpr, SQUARED: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Gradient of CHUNK classes of STRIP x (CELLS - 1) source pixels, gathered from the STRIP + 1 cell rows and CELLS
    cells around them. Grid: (N * class chunks * strips * tiles,), tiles fastest."""
    program = tl.program_id(0)
    source_column = program % tiles * (CELLS - 1)
    source_row = program // tiles % strips * STRIP
    start = program // (tiles * strips) % tl.cdiv(C, CHUNK) * CHUNK
    n = (program // (tiles * strips) // tl.cdiv(C, CHUNK)).to(tl.int64)
    classes, read = chunk_of_classes(start, C, CHUNK)
    image_pointer = input + n * image

    lane = tl.arange(0, CELLS * LANES)
    column_cell = tl.minimum(source_column + lane // LANES, source_width + 1)  # cell source_width + 1 has no outputs
    first_x = first_output(column_cell, source_width, width, column_numerator, column_denominator, HALF)
    last_x = first_output(column_cell + 1, source_width, width, column_numerator, column_denominator, HALF)
    left, right = neighbours(tl.minimum(column_cell, source_width), source_width, COLUMN_SPAN)
    left, right = left * column, right * column

    scale = 1.0
    if grad_numerator is not None:
        scale = tl.load(grad_numerator).to(tl.float32)
    if SMOOTHING:
        uniform = label_smoothing / C
        weights = uniform * class_values(class_weight, classes, C)
        all_weights = uniform * weight_sum(class_weight, C)
    carried = tl.zeros((CHUNK, CELLS), tl.float32)  # the part of the cell row above for the source row below it
    for step in range(tl.minimum(STRIP, source_height - source_row) + 1):
        cell = source_row + step
        first_y = first_output(cell, source_height, height, row_numerator, row_denominator, HALF)
        last_y = first_output(cell + 1, source_height, height, row_numerator, row_denominator, HALF)
        top, bottom = neighbours(cell, source_height, ROW_SPAN)
        top, bottom = top * row, bottom * row
        above_before = tl.zeros((CHUNK, CELLS), tl.float32)
        above_after = tl.zeros((CHUNK, CELLS), tl.float32)
        below_before = tl.zeros((CHUNK, CELLS), tl.float32)
        below_after = tl.zeros((CHUNK, CELLS), tl.float32)
        for part in range(row_chunks * column_chunks):
            first_row = first_y + part // column_chunks * ROWS
            y = first_row + tl.arange(0, ROWS)
            x = first_x + part % column_chunks * LANES + lane % LANES
            _, row_fraction = sample(y, source_height, row_numerator, row_denominator, HALF)
            _, column_fraction = sample(x, source_width, column_numerator, column_denominator, HALF)
            inside = (y < last_y)[:, None] & (x < last_x)[None, :]
            origin = (n * height + first_row) * width
            offset = tl.arange(0, ROWS)[:, None] * width + x[None, :]
            labels = tl.load(target + origin + offset, mask=inside, other=0)
            label, valid = valid_labels(labels, inside, ignore_index, C, False)
            label_weight, each = weights_of_pixels(class_weight, pixel_weight, label, origin, offset, valid)
            if grad_losses is not None:
                each *= tl.load(grad_losses + origin + offset, mask=inside, other=0.0)
            each *= scale

            logits = upsampled(image_pointer, plane, read, top, bottom, left, right, row_fraction, column_fraction)
            sum_of_pixel = tl.load(log_total + origin + offset, mask=inside, other=0.0)
            probability = tl.exp2(logits - sum_of_pixel[None, :, :])
            true = label[None, :, :] == classes[:, None, None]
            on_true = each * label_weight
            on_all = on_true
            if SMOOTHING:
                on_true = (1.0 - label_smoothing) * on_true
                on_all = on_true + each * all_weights
            share = probability * on_all[None, :, :] - tl.where(true, on_true[None, :, :], 0.0)
            if SMOOTHING:
                share -= each[None, :, :] * weights
            if mean_gradient is not None:
                outer = class_values(grad_prediction + n * C, classes, C)
                if SQUARED:
                    outer = 2.0 * outer * probability
                outer += tl.where(true, class_values(grad_intersection + n * C, classes, C), 0.0)
                mean = tl.load(mean_gradient + origin + offset, mask=inside, other=0.0)
                share += probability * (outer - mean[None, :, :])
            share = tl.where(valid[None, :, :], share, 0.0)

            above_weight, below_weight = cell_weights(cell, row_fraction, source_height)
            before_weight, after_weight = cell_weights(column_cell, column_fraction, source_width)
            above = tl.sum(share * above_weight[None, :, None], 1)
            below = tl.sum(share * below_weight[None, :, None], 1)
            above_before += add_lanes(above, before_weight, CHUNK, CELLS, LANES)
            above_after += add_lanes(above, after_weight, CHUNK, CELLS, LANES)
            below_before += add_lanes(below, before_weight, CHUNK, CELLS, LANES)
            below_after += add_lanes(below, after_weight, CHUNK, CELLS, LANES)
        complete = carried + to_sources(above_before, above_after, CHUNK, CELLS)
        carried = to_sources(below_before, below_after, CHUNK, CELLS)
        if step > 0:  # the source row above this cell row is complete
            s = source_column + tl.arange(0, CELLS)
            owned = (tl.arange(0, CELLS) < CELLS - 1) & (s < source_width)
            place = gradient + n * gradient_image + (cell - 1).to(tl.int64) * gradient_row
            place += classes.to(tl.int64)[:, None] * gradient_plane + s.to(tl.int64)[None, :] * gradient_column
            tl.store(place, complete.to(gradient.dtype.element_ty), mask=owned[None, :] & (classes < C)[:, None])
