"""paste_masks and upsample_masks: golden values, the usual formulations, hostile boxes, all forms of output."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import paste_masks, unpack_masks, upsample_masks
from fastseg.testing import allowed_error, assert_within_policy
from tests.contract import Case, Contract

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")
CONVENTIONS = ("detectron2", "torchvision")
NAN, INF = float("nan"), float("inf")


# --- the usual formulations ---


def detectron2(masks, boxes, image_shape):
    """As in paste_masks_in_image: samples every pixel of the image, by grid_sample."""
    height, width = image_shape
    left, top, right, bottom = boxes.to(masks.dtype).split(1, 1)
    pixels = lambda size: torch.arange(size, dtype=masks.dtype, device=masks.device) + 0.5  # noqa: E731
    y = (pixels(height) - top) / (bottom - top) * 2 - 1
    x = (pixels(width) - left) / (right - left) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def torchvision(masks, boxes, image_shape):
    """As roi_heads.paste_masks_in_image: interpolates to the box grown to whole pixels, and copies the image's part.

    The box is found in fp32 whatever the dtype of the masks.
    """
    height, width = image_shape
    result = masks.new_zeros(len(masks), height, width)
    size = masks.shape[-1]
    boxes = boxes.float()
    half, centre = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((size + 2) / size), (boxes[:, 2:] + boxes[:, :2]) * 0.5
    grown = torch.cat([centre - half, centre + half], 1).to(torch.int64).tolist()
    for image, mask, (left, top, right, bottom) in zip(result, F.pad(masks, (1, 1, 1, 1)), grown):
        w, h = max(right - left + 1, 1), max(bottom - top + 1, 1)
        mask = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0]
        x0, x1, y0, y1 = max(left, 0), min(right + 1, width), max(top, 0), min(bottom + 1, height)
        if x0 < x1 and y0 < y1:
            image[y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    return result


def two_steps(logits, size, padded_size=None, input_size=None):
    """As Segment Anything's postprocess_masks."""
    values = logits[:, None]
    if padded_size is not None:
        values = F.interpolate(values, padded_size, mode="bilinear", align_corners=False)
    if input_size is not None:
        values = values[..., : input_size[0], : input_size[1]]
    return F.interpolate(values, size, mode="bilinear", align_corners=False)[:, 0]


USUAL = {"detectron2": detectron2, "torchvision": torchvision}


def in_fp32(values):
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def pasted(masks, boxes, image_shape, output="bool", convention="detectron2", threshold=0.5):
    values = USUAL[convention](in_fp32(masks), in_fp32(boxes), image_shape)
    return values >= threshold if convention == "detectron2" else values > threshold


def upsampled(logits, size, output="bool", **sizes):
    if len(logits) == 0:
        return torch.zeros(0, *size, dtype=torch.bool)
    return two_steps(in_fp32(logits), size, **sizes) > 0


def paste_case(count, mask=(6, 5), image=(20, 33), **options):
    def arguments(make):
        low, extent = make.constant(count, 2, low=-6, high=18), make.constant(count, 2, low=2, high=20)
        boxes = torch.cat([low, low + extent], 1)
        return dict(masks=make.floating(count, *mask), boxes=boxes, image_shape=image, output="bool", **options)

    return arguments


def upsample_case(count, size, mask=(6, 5), **options):
    return lambda make: dict(logits=make.floating(count, *mask), size=size, output="bool", **options)


CONTRACTS = [
    Contract(
        function=paste_masks,
        stock=pasted,
        cases=[
            Case("detectron2", paste_case(4)),
            Case("torchvision", paste_case(4, mask=(7, 7), convention="torchvision")),
            Case("no mask", paste_case(0)),
        ],
        exact=True,
    ),
    Contract(
        function=upsample_masks,
        stock=upsampled,
        cases=[
            Case("larger", upsample_case(3, (20, 33))),
            Case("of a padded image", upsample_case(3, (40, 50), padded_size=(24, 20), input_size=(15, 20))),
            Case("smaller", upsample_case(2, (4, 3), mask=(9, 13))),
            Case("no mask", upsample_case(0, (20, 33))),
        ],
        exact=True,
    ),
]


# --- values ---

GOLDEN = {
    "torchvision": (
        [1, 1, 3, 3],
        [[0] * 5, [0, 0.49, 0.7, 0.49, 0], [0, 0.7, 1, 0.7, 0], [0, 0.49, 0.7, 0.49, 0], [0] * 5],
    ),
    "detectron2": ([1, 1, 3, 3], [[0] * 5, [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5]),
    "detectron2, fractions": (
        [1.25, 1, 3.75, 3.5],
        [[0, 0.07, 0.1, 0.07, 0], [0, 0.63, 0.9, 0.63, 0], [0, 0.7, 1, 0.7, 0], [0, 0.35, 0.5, 0.35, 0], [0] * 5],
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, dtype, backend, device):
    box, expected = GOLDEN[name]
    expected, convention = torch.tensor([expected], dtype=torch.float64), name.partition(",")[0]
    masks, boxes = torch.ones(1, 2, 2, dtype=dtype, device=device), torch.tensor([box], dtype=dtype, device=device)
    soft = paste_masks(masks, boxes, (5, 5), convention=convention, output="soft", backend=backend).cpu()
    assert soft.dtype == dtype
    stock = USUAL[convention](in_fp32(masks), in_fp32(boxes), (5, 5)).to(dtype).cpu()
    assert_within_policy(soft, stock, expected)
    bits = paste_masks(masks, boxes, (5, 5), convention=convention, backend=backend)
    wanted = expected >= 0.5 if convention == "detectron2" else expected > 0.5
    assert bits.shape == (1, 5, 5) and torch.equal(unpack_masks(bits).cpu(), wanted)


def random_masks(count, size=(28, 28), image=(75, 101), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    extent = torch.tensor([image[1], image[0]])
    centre, side = uniform(count, 2) * extent, 3 + uniform(count, 2) * extent * 0.7
    return uniform(count, *size).to(dtype), torch.cat([centre - side / 2, centre + side / 2], 1).to(dtype)


def assert_bits(bits, soft, exact, threshold):
    """Bits must be right wherever the fp64 value is further from the threshold than the tolerance."""
    clear = (exact - threshold).abs() > allowed_error(soft, exact)
    assert torch.equal(bits[clear], exact[clear] > threshold) and clear.float().mean() > 0.99


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (14, 14), (3, 3), (200, 200)])
def test_random_boxes_as_the_usual_formulation(size, convention, device):
    image = (75, 101)
    masks, boxes = (tensor.to(device) for tensor in random_masks(20, size))
    stock = USUAL[convention](masks, boxes, image).cpu()
    exact = USUAL[convention](masks.double(), boxes.double(), image).cpu()
    soft = paste_masks(masks, boxes, image, convention=convention, output="soft").cpu()
    assert_within_policy(soft, stock, exact)
    for threshold in (0.2, 0.5):
        bits = paste_masks(masks, boxes, image, convention=convention, threshold=threshold, output="bool").cpu()
        assert_bits(bits, stock, exact, threshold)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("width", [1, 15, 31, 32, 33, 64, 65, 250])
def test_every_form_is_that_of_the_reference(width, convention, dtype, device):
    """Bit by bit: both compute the same sums."""
    masks, boxes = (tensor.to(device) for tensor in random_masks(12, (9, 13), (40, width), dtype=dtype))
    options = dict(convention=convention, threshold=0.4)
    for output in ("packed", "bool", "soft"):
        ours = paste_masks(masks, boxes, (40, width), output=output, **options)
        reference = paste_masks(masks, boxes, (40, width), output=output, **options, backend="reference")
        if output == "packed":
            assert ours.words.shape == (12, 40, (width + 31) // 32)
            ours, reference = ours.words, reference.words
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_no_pixel_outside_of_its_box(convention, device):
    masks, boxes = (tensor.to(device) for tensor in random_masks(50))
    masks = torch.ones_like(masks)
    inside = unpack_masks(paste_masks(masks, boxes, (75, 101), convention=convention)).nonzero()
    corners = boxes[inside[:, 0]]
    centre = inside[:, [2, 1]] + 0.5
    margin = 0 if convention == "detectron2" else 1.5  # torchvision's boxes are cut to integers, both ends inclusive
    assert len(inside) > 1000
    assert (centre >= corners[:, :2] - margin).all() and (centre <= corners[:, 2:] + margin).all()


VALUES = [NAN, INF, -INF, 0.0, 5.0, 5.5, 11.0, -20.0, 60.0, 1e9, -1e9, 3e38, -3e38, 1e-40, 2.0**31, 2.0**63]


@pytest.mark.sanitized
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_boxes_and_masks_give_what_the_reference_gives(data):
    count = data.draw(st.integers(1, 4), "count")
    draw = lambda values, size: data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))  # noqa: E731
    boxes = torch.tensor(draw(VALUES, 4 * count)).reshape(count, 4)
    masks = torch.tensor(draw([0.0, 0.5, 1.0, 0.25, NAN, INF], 6 * count)).reshape(count, 2, 3)
    for convention in CONVENTIONS:
        for output in ("bool", "soft"):
            options = dict(image_shape=(9, 37), convention=convention, output=output)
            ours = paste_masks(masks, boxes, **options)
            reference = paste_masks(masks, boxes, **options, backend="reference")
            torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    "box",
    [
        [NAN, 0, 5, 5],
        [0, 0, INF, 5],
        [-INF, 0, INF, 5],
        [0, 0, 5, NAN],
        [90, 0, 99, 5],
        [0, -50, 9, -20],
        [1e30] * 4,
        [9, 3, 3, 8],
        [3, 8, 9, 3],
    ],
)
def test_no_pixel_of_such_boxes(box, convention, backend, device):
    masks, boxes = torch.ones(1, 4, 4, device=device), torch.tensor([box], dtype=torch.float32, device=device)
    options = dict(image_shape=(10, 40), convention=convention, backend=backend)
    assert paste_masks(masks, boxes, **options).area.tolist() == [0]
    assert not paste_masks(masks, boxes, **options, output="soft").any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_without_area_get_no_pixel(backend, device):
    boxes = torch.tensor([[3.0, 3, 3, 9], [9, 2, 3, 8]], device=device)
    masks = torch.ones(2, 4, 4, device=device)
    assert not paste_masks(masks, boxes, (12, 12), output="soft", backend=backend).any()


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_box_shows_its_middle(backend, device):
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9]], device=device)
    masks = torch.tensor([[[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]], device=device)
    assert paste_masks(masks, boxes, (8, 40), output="bool", backend=backend).all()


# --- upsample_masks ---

SIZES = {
    "larger": dict(size=(75, 101)),
    "a little": dict(size=(18, 25)),
    "same": dict(size=(17, 23)),
    "smaller": dict(size=(9, 5)),
    "one pixel": dict(size=(1, 1)),
    "long": dict(size=(3, 700)),
    "padded": dict(size=(120, 77), padded_size=(68, 92), input_size=(50, 92)),
    "cut": dict(size=(33, 31), input_size=(10, 11)),
    "padded and cut": dict(size=(50, 60), padded_size=(68, 92), input_size=(50, 60)),
    "by way of few": dict(size=(40, 41), padded_size=(5, 6), input_size=(4, 6)),
    "by way of one": dict(size=(40, 41), padded_size=(5, 6), input_size=(1, 1)),
}


@pytest.mark.parametrize("name", SIZES)
def test_upsampling_as_the_usual_formulation(name, device):
    logits = torch.randn(5, 17, 23).to(device)
    stock, exact = two_steps(logits, **SIZES[name]).cpu(), two_steps(logits.double(), **SIZES[name]).cpu()
    assert_within_policy(upsample_masks(logits, **SIZES[name], output="soft").cpu(), stock, exact)
    for threshold in (0.0, -0.5):
        bits = upsample_masks(logits, **SIZES[name], threshold=threshold)
        assert bits.shape == (5, *SIZES[name]["size"])
        assert_bits(unpack_masks(bits).cpu(), stock, exact, threshold)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["larger", "padded", "smaller"])
def test_every_form_of_upsampling(name, dtype, device):
    logits = torch.randn(4, 17, 23).to(device, dtype)
    soft = upsample_masks(logits, **SIZES[name], output="soft")
    bits = upsample_masks(logits, **SIZES[name], output="bool", threshold=0.25)
    packed = upsample_masks(logits[:, None], **SIZES[name], threshold=0.25)
    assert soft.dtype == dtype and torch.equal(bits, unpack_masks(packed))
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(bits, soft > 0.25)
    if dtype != torch.float64:
        in_fp32 = upsample_masks(logits.float(), **SIZES[name], output="soft")
        assert torch.equal(soft, in_fp32.to(dtype)) and torch.equal(bits, in_fp32 > 0.25)


def test_a_negative_threshold_sets_no_padding_bit(device):
    packed = upsample_masks(torch.zeros(2, 4, 4, device=device), (10, 37), threshold=-1)
    assert packed.area.tolist() == [370, 370] and (packed.words[..., 1] == 31).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_logits_belong_to_no_mask(backend, device):
    logits = torch.ones(1, 4, 4, device=device)
    logits[0, 1, 2] = NAN
    expected = (two_steps(logits, (16, 16)) > 0).cpu()
    assert torch.equal(upsample_masks(logits, (16, 16), output="bool", backend=backend).cpu(), expected)


def test_results_do_not_depend_on_threads():
    logits, (masks, boxes) = torch.randn(3, 40, 40), random_masks(7, image=(300, 400))
    run = lambda: (upsample_masks(logits, (300, 401)).words, paste_masks(masks, boxes, (300, 401)).words)  # noqa: E731
    threads, expected = torch.get_num_threads(), run()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert all(torch.equal(*pair) for pair in zip(run(), expected))
    finally:
        torch.set_num_threads(threads)


# --- programs ---


class Both(torch.nn.Module):
    def forward(self, masks, boxes, logits):
        pasted = paste_masks(masks, boxes, (logits.shape[1] * 4, logits.shape[2] * 4))
        return pasted.words, upsample_masks(logits, (64, 50)).words


def test_packed_masks_compile_and_export():
    masks, boxes = random_masks(5, image=(40, 48))
    logits = torch.randn(3, 10, 12)
    expected = Both()(masks, boxes, logits)
    torch._dynamo.reset()
    compiled = torch.compile(Both(), fullgraph=True, backend="aot_eager")
    count = torch.export.Dim("count")
    program = torch.export.export(
        Both(), (masks, boxes, logits), dynamic_shapes=({0: count}, {0: count}, None)
    ).module()
    for run in (compiled, program):
        assert all(torch.equal(*pair) for pair in zip(run(masks, boxes, logits), expected))
    masks, boxes = random_masks(9, image=(40, 48))
    assert torch.equal(program(masks, boxes, logits)[0], Both()(masks, boxes, logits)[0])


# --- arguments ---


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(masks=torch.zeros(3, 4)), RuntimeError, r"masks has shape \(3, 4\); allowed: \(N, h, w\)"),
        (dict(masks=torch.zeros(3, 2, 4, 4)), RuntimeError, r"masks has shape \(3, 2, 4, 4\)"),
        (dict(masks=torch.zeros(3, 0, 4)), RuntimeError, r"masks has shape \(3, 0, 4\); allowed: .* not 0"),
        (dict(masks=torch.zeros(3, 4, 4).bool()), RuntimeError, "masks has dtype bool"),
        (dict(masks=[]), TypeError, "masks is list"),
        (dict(boxes=torch.zeros(3, 5)), RuntimeError, r"boxes has shape \(3, 5\); allowed: \(3, 4\) \(a box"),
        (dict(boxes=torch.zeros(2, 4)), RuntimeError, r"boxes has shape \(2, 4\)"),
        (dict(boxes=torch.zeros(3, 4).long()), RuntimeError, "boxes has dtype int64"),
        (dict(boxes=torch.zeros(3, 4, device="meta")), RuntimeError, "boxes is on meta"),
        (dict(image_shape=(0, 5)), ValueError, r"image_shape=\(0, 5\); allowed: 1 to"),
        (dict(image_shape=(5, 2**40)), ValueError, "image_shape=.*; allowed: 1 to"),
        (dict(image_shape=5), ValueError, r"image_shape=5; allowed: \(height, width\)"),
        (dict(image_shape=(5, 5.5)), TypeError, "image_shape=.*5.5"),
        (dict(threshold=NAN), ValueError, "threshold=nan; allowed: 0 to 1"),
        (dict(threshold=-1), ValueError, "threshold=-1.0; allowed: 0 to 1"),
        (dict(threshold="half"), TypeError, "threshold='half'; allowed: a number"),
        (dict(convention="coco"), ValueError, "convention='coco'; allowed: 'detectron2', 'torchvision'"),
        (dict(output="rle"), ValueError, "output='rle'; allowed: 'packed', 'bool', 'soft'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"masks": torch.zeros(3, 4, 4), "boxes": torch.zeros(3, 4), "image_shape": (8, 8), **changes}
    with pytest.raises(error, match=f"fastseg.ops.paste_masks: {message}"):
        paste_masks(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(logits=torch.zeros(3, 4)), RuntimeError, r"logits has shape \(3, 4\); allowed: \(N, h, w\)"),
        (dict(logits=torch.zeros(3, 4, 0)), RuntimeError, r"logits has shape \(3, 4, 0\)"),
        (dict(logits=torch.zeros(3, 4, 4).int()), RuntimeError, "logits has dtype int32"),
        (dict(size=(0, 4)), ValueError, r"size=\(0, 4\)"),
        (dict(size="ab"), TypeError, "size='ab'"),
        (dict(padded_size=(4, -1)), ValueError, "padded_size="),
        (dict(input_size=(5, 4)), ValueError, r"input_size=\(5, 4\); allowed: up to padded_size, \(4, 4\)"),
        (dict(padded_size=(8, 8), input_size=(8, 9)), ValueError, r"input_size=\(8, 9\)"),
        (dict(threshold=NAN), ValueError, "threshold=nan"),
        (dict(output="png"), ValueError, "output='png'"),
    ],
)
def test_bad_arguments_of_upsampling_are_named(changes, error, message):
    with pytest.raises(error, match=f"fastseg.ops.upsample_masks: {message}"):
        upsample_masks(**{"logits": torch.zeros(3, 4, 4), "size": (8, 8), **changes})
