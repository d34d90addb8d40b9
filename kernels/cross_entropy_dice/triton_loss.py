"""The loss from the sums of the softmax (or sigmoid) statistics, and its gradient, in one launch each: see README.md.

In plain PyTorch these are some forty launches on a few numbers, which take longer than the sweeps over one image.
"""

import triton
import triton.language as tl

from fastseg._triton import AotCase, on_device_of

MOST_CLASSES = 256  # per block: a Dice quotient per class, all of its images read by one program


@triton.jit
def class_sums(intersection, prediction, truth, images, C, c, smooth):
    """Numerators and denominators of the Dice quotients of classes `c` over all images: (BLOCK,) fp64 each."""
    above = tl.zeros_like(c).to(tl.float64) + smooth
    below = above
    for n in range(0, images):
        place = n * C + c
        above += 2 * tl.load(intersection + place, mask=c < C, other=0.0)
        below += tl.load(prediction + place, mask=c < C, other=0.0) + tl.load(truth + place, mask=c < C, other=0.0)
    return above, below


@triton.jit
def loss_of_sums_kernel(
    intersection, prediction, truth,  # [N, C] fp64
    numerator, denominator,  # [] fp64
    loss,  # [] any floating type
    images, C, first_class, quotients, ce_weight, dice_weight, smooth,
    PER_IMAGE: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program."""
    lanes = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, C, BLOCK):
        c = start + lanes
        counts = (c >= first_class) & (c < C)
        if PER_IMAGE:
            for n in range(0, images):
                above, below = class_sums(intersection + n * C, prediction + n * C, truth + n * C, 1, C, c, smooth)
                losses += tl.where(counts, 1 - above / below, 0.0)
        else:
            above, below = class_sums(intersection, prediction, truth, images, C, c, smooth)
            losses += tl.where(counts, 1 - above / below, 0.0)
    total = tl.zeros((), tl.float64)
    if ce_weight != 0:
        divisor = tl.load(denominator)
        mean = tl.load(numerator) / divisor
        if ZERO_IF_EMPTY:
            mean = tl.where(divisor == 0, 0.0, mean)
        total += ce_weight * mean
    if dice_weight != 0:
        mean = tl.sum(losses, 0) / quotients
        if ZERO_IF_EMPTY:
            mean = tl.where(quotients == 0, 0.0, mean)
        total += dice_weight * mean
    if loss.dtype.element_ty != tl.float64:
        total = total.to(tl.float32)  # the interpreter cannot round fp64 to half types
    tl.store(loss, total)


@triton.jit
def loss_of_sums_backward_kernel(
    intersection, prediction, truth,  # [N, C] fp64
    denominator,  # [] fp64
    grad_loss,  # [] any floating type
    grad_intersection, grad_prediction,  # [N, C] fp64
    grad_numerator,  # [] fp64
    images, C, first_class, quotients, ce_weight, dice_weight, smooth,
    PER_IMAGE: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK classes; the first one also writes the gradient of the cross-entropy."""
    slope = tl.load(grad_loss).to(tl.float64)
    if tl.program_id(0) == 0:
        share = tl.zeros((), tl.float64)
        if ce_weight != 0:
            divisor = tl.load(denominator)
            share = 1.0 / divisor
            if ZERO_IF_EMPTY:
                share = tl.where(divisor == 0, 0.0, share)
            share = share * slope * ce_weight
        tl.store(grad_numerator, share)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = (c >= first_class) & (c < C) & (dice_weight != 0)
    each = slope * dice_weight / quotients  # no image, nothing is stored: quotients is not 0 where this is used
    above, below = class_sums(intersection, prediction, truth, images, C, c, smooth)
    for n in range(0, images):
        place = n * C + c
        if PER_IMAGE:
            above, below = class_sums(intersection + n * C, prediction + n * C, truth + n * C, 1, C, c, smooth)
        tl.store(grad_intersection + place, tl.where(counts, -2 * each / below, 0.0), mask=c < C)
        tl.store(grad_prediction + place, tl.where(counts, each * above / (below * below), 0.0), mask=c < C)


def _block(classes: int) -> int:
    return min(MOST_CLASSES, triton.next_power_of_2(max(classes, 1)))


def _options(intersection, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty):
    """(run-time arguments, constexprs) that both kernels share."""
    images, classes = intersection.shape
    first = 0 if include_background else 1
    quotients = (images if per_image else 1) * (classes - first)
    constexprs = dict(PER_IMAGE=per_image, ZERO_IF_EMPTY=zero_if_empty, BLOCK=_block(classes), num_warps=1)
    return (images, classes, first, float(quotients), ce_weight, dice_weight, smooth), constexprs


def loss_of_sums(
    intersection,
    prediction,
    truth,
    numerator,
    denominator,
    ce_weight,
    dice_weight,
    smooth,
    include_background,
    per_image,
    zero_if_empty,
    loss,
) -> None:
    """loss: [] of any floating dtype."""
    numbers, constexprs = _options(
        intersection, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty
    )
    with on_device_of(numerator):
        loss_of_sums_kernel[(1,)](intersection, prediction, truth, numerator, denominator, loss, *numbers, **constexprs)


def loss_of_sums_backward(
    intersection,
    prediction,
    truth,
    denominator,
    grad_loss,
    ce_weight,
    dice_weight,
    smooth,
    include_background,
    per_image,
    zero_if_empty,
    grad_intersection,
    grad_prediction,
    grad_numerator,
) -> None:
    """grad_intersection, grad_prediction: [N, C] fp64; grad_numerator: [] fp64."""
    numbers, constexprs = _options(
        intersection, ce_weight, dice_weight, smooth, include_background, per_image, zero_if_empty
    )
    grid = (max(1, triton.cdiv(intersection.size(1), constexprs["BLOCK"])),)
    with on_device_of(denominator):
        loss_of_sums_backward_kernel[grid](
            intersection, prediction, truth, denominator, grad_loss, grad_intersection, grad_prediction,
            grad_numerator, *numbers, **constexprs,
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    def case(kernel, per_image: bool) -> AotCase:
        names = [name for name in kernel.arg_names if name.islower()]
        integers, floats = ("images", "C", "first_class"), ("quotients", "ce_weight", "dice_weight", "smooth")
        signature = {name: "*fp64" for name in names if name not in floats + integers}
        signature |= {name: "*fp32" for name in ("loss", "grad_loss") if name in names}
        signature |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
        return AotCase(
            f"{kernel.__name__}{'-per-image' if per_image else ''}",
            kernel,
            signature,
            dict(PER_IMAGE=per_image, ZERO_IF_EMPTY=True, BLOCK=32),
            num_warps=1,
        )

    kernels = (loss_of_sums_kernel, loss_of_sums_backward_kernel)
    return [case(kernel, per_image) for kernel in kernels for per_image in (False, True)]
