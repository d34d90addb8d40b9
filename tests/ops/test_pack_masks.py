"""pack_masks, unpack_masks and PackedMasks: round trips, set arithmetic, layouts, dtypes, hostile input."""

import copy
import pickle

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg.ops import PackedMasks, pack_masks, unpack_masks
from tests.contract import Case, Contract
from tests.ops._masks import WIDTHS, ellipses, noise

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")


def packed_parts(masks, threshold, backend="auto"):
    packed = pack_masks(masks, threshold, backend=backend)
    return packed.words, packed.area, packed.boxes


def brute_force(masks, threshold):
    """One mask after the other, in NumPy."""
    height, width = masks.shape[-2:]
    count = masks.shape[0] if masks.dim() > 2 else 1
    pixels = (masks > threshold).detach().cpu().numpy().reshape(count, height, width)
    padded = numpy.zeros((count, height, -(-width // 32) * 32), dtype=bool)
    padded[..., :width] = pixels
    words = numpy.packbits(padded, axis=-1, bitorder="little").view("<i4")
    boxes = numpy.zeros((count, 4), dtype=numpy.int32)
    for box, mask in zip(boxes, pixels):
        y, x = mask.nonzero()
        if len(x):
            box[:] = x.min(), y.min(), x.max() + 1, y.max() + 1
    area = pixels.reshape(count, height * width).sum(1)
    return tuple(torch.from_numpy(numpy.array(part)).to(masks.device) for part in (words, area, boxes))


def masks_case(*shape, threshold=0.5):
    return lambda make: dict(masks=make.floating(*shape), threshold=threshold)


CONTRACTS = [
    Contract(
        function=packed_parts,
        stock=brute_force,
        name="pack_masks",
        cases=[
            Case("masks", masks_case(3, 5, 70)),
            Case("one channel", masks_case(3, 1, 9, 33)),
            Case("one mask", masks_case(20, 64, threshold=-0.25)),
            Case("no masks", masks_case(0, 5, 7)),
            Case("no rows", masks_case(2, 0, 7)),
        ],
        rejected=(torch.int64, torch.int16, torch.complex64),
        exact=True,
    ),
    Contract(
        function=lambda masks, backend="auto": unpack_masks(
            pack_masks(masks, 0.5, backend=backend), masks.dtype, backend=backend
        ),
        stock=lambda masks: (masks > 0.5).to(masks.dtype),
        name="unpack_masks",
        cases=[
            Case(f"width {width}", lambda make, width=width: dict(masks=make.floating(2, 5, width)))
            for width in (33, 1, 64, 100)
        ],
        exact=True,
    ),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_of_every_width(width, backend, device):
    masks = noise(5, 7, width).to(device)
    packed = pack_masks(masks, backend=backend)
    assert packed.words.shape == (5, 7, -(-width // 32)) and packed.words.dtype == torch.int32
    for one, two in zip((packed.words, packed.area, packed.boxes), brute_force(masks.byte(), 0)):
        assert torch.equal(one, two)
    for dtype in (torch.bool, torch.uint8, *FLOATS):
        unpacked = unpack_masks(packed, dtype, backend=backend)
        assert torch.equal(unpacked, masks.to(dtype)) and unpacked.dtype == dtype and unpacked.is_contiguous()


@pytest.mark.sanitized
@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
@pytest.mark.parametrize("height", [0, 1, 15, 16, 500])  # one strip per mask, and several
def test_numbers_and_heights(count, height, device):
    masks = noise(count, height, 45, density=0.01).to(device)
    packed = pack_masks(masks)
    for one, two in zip((packed.words, packed.area, packed.boxes), brute_force(masks.byte(), 0)):
        assert torch.equal(one, two)


def layouts_of(masks):
    yield "transposed", masks.transpose(1, 2).contiguous().transpose(1, 2)
    yield "masks last", masks.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    yield "sliced", torch.cat([masks, masks], 2)[:, :, : masks.shape[2]]
    yield "every second", masks.repeat_interleave(2, 2)[:, :, ::2]
    yield "rows", masks.repeat_interleave(2, 1)[:, ::2]
    yield "offset", torch.cat([masks.flatten()[:3], masks.flatten()])[3:].view(masks.shape)
    yield "one channel", masks.unsqueeze(1).contiguous(memory_format=torch.channels_last)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, *FLOATS))
def test_every_layout(dtype, device):
    masks = noise(6, 21, 77).to(device, dtype)
    threshold = 0.5 if masks.is_floating_point() else None
    expected = pack_masks(masks, threshold).words
    for name, given_masks in layouts_of(masks):
        assert torch.equal(pack_masks(given_masks, threshold).words, expected), name
    expanded = masks[:1].expand(6, 21, 77)
    assert torch.equal(pack_masks(expanded, threshold).words, expected[:1].expand(6, -1, -1))
    row = masks[:, :1].expand(6, 21, 77)
    assert torch.equal(pack_masks(row, threshold).words, expected[:, :1].expand(6, 21, -1))


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_that_are_not_one(backend, device):
    masks = torch.arange(256, dtype=torch.uint8, device=device).view(1, 4, 64)
    assert torch.equal(unpack_masks(pack_masks(masks, backend=backend)), masks != 0)
    as_bool = masks.view(torch.bool)  # as a kernel that writes arbitrary bytes may produce
    assert torch.equal(unpack_masks(pack_masks(as_bool, backend="auto")), masks != 0)
    for threshold in (-1e300, -1, -0.5, 0, 0.5, 127, 127.5, 253.9, 254, 254.5, 255, 256, 1e300, torch.inf, -torch.inf):
        found = unpack_masks(pack_masks(masks, threshold, backend=backend))
        assert torch.equal(found.cpu(), torch.from_numpy(masks.cpu().numpy().astype(float) > threshold)), threshold


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_thresholds_are_those_of_the_stock_comparison(dtype, backend, device):
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.1, 0.3, 1e-40, 65504.0, 3e38]
    values = torch.tensor(special, dtype=torch.float64).repeat(10).view(1, 2, 50).to(device, dtype)
    for threshold in (0.0, -0.0, 0.1, 0.3, 0.5, 1e-40, torch.inf, -torch.inf, 1e300):
        found = unpack_masks(pack_masks(values, threshold, backend=backend))
        assert torch.equal(found, values > threshold), threshold


def test_large_masks(device):
    masks = noise(3, 1100, 1300, density=0.3).to(device)
    assert torch.equal(unpack_masks(pack_masks(masks)), masks)


# --- PackedMasks ---


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**32), st.data())
def test_set_arithmetic_indexing_and_cropping(count, height, width, seed, data):
    a, b = noise(count, height, width, seed), noise(count, height, width, seed + 1)
    packed, other = pack_masks(a), pack_masks(b)
    results = [(packed & other, a & b), (packed | other, a | b), (PackedMasks.cat([packed, other]), torch.cat([a, b]))]
    if count:
        place = data.draw(st.integers(-count, count - 1), "place")
        chosen = data.draw(st.lists(st.integers(-count, count - 1), max_size=5), "chosen")
        index = torch.tensor(chosen, dtype=torch.int64)
        results += [(packed[place], a[place].unsqueeze(0)), (packed[chosen], a[index]), (packed[index], a[index]),
                    (packed & other[place], a & b[place]), (other[place] | packed, a | b[place])]  # fmt: skip
    some = torch.rand(count) < 0.5
    results += [(packed[some], a[some]), (packed[1:], a[1:]), (packed[::2], a[::2])]
    x1 = data.draw(st.integers(0, width), "x1")
    x2 = data.draw(st.integers(x1, width), "x2")
    y1 = data.draw(st.integers(0, height), "y1")
    y2 = data.draw(st.integers(y1, height), "y2")
    results.append((packed.crop(x1, y1, x2, y2), a[:, y1:y2, x1:x2]))
    for found, expected in results:
        assert len(found) == len(expected) and found.shape == tuple(expected.shape)
        assert torch.equal(unpack_masks(found), expected)
        fresh = pack_masks(expected)
        assert torch.equal(found.words, fresh.words), "bits past the end of a row"
        assert torch.equal(found.area, fresh.area) and torch.equal(found.boxes, fresh.boxes)
    assert torch.equal(unpack_masks(packed), a)


def test_what_is_known_is_found_once_and_kept():
    packed = pack_masks(ellipses(6, 40, 50))
    assert packed[2:]._area is not None and PackedMasks.cat([packed, packed])._boxes is not None
    joined = packed[:3] | packed[3:]
    assert joined._area is None
    assert joined.area is joined.area and joined.boxes is joined.boxes


def test_packed_masks_from_words():
    packed = pack_masks(ellipses(6, 40, 50))
    again = PackedMasks(packed.words, 50)
    assert torch.equal(again.area, packed.area) and torch.equal(again.boxes, packed.boxes)
    assert repr(again) == "PackedMasks(6 masks of 40 x 50, device='cpu')"
    assert [len(one) for one in again] == [1] * 6 and again.shape == (6, 40, 50)
    assert torch.equal(again.to("cpu").words, again.words) and torch.equal(again.cpu().area, packed.area)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied.words, packed.words) and copied.width == 50
    meta = packed.to("meta")
    assert meta.device.type == "meta" and (meta & meta).area.shape == (6,)


def test_inputs_are_not_changed():
    masks = ellipses(4, 30, 47)
    packed = pack_masks(masks)
    before = packed.words.clone()
    for window in ((0, 0, 47, 30), (0, 0, 40, 30), (32, 0, 47, 30), (5, 3, 40, 20)):
        packed.crop(*window)
    packed & packed[:1], packed | packed
    assert torch.equal(packed.words, before) and torch.equal(masks, ellipses(4, 30, 47))


def test_compiles_with_packed_masks_inside_and_across():
    masks, others = ellipses(6, 40, 50), ellipses(6, 40, 50, seed=1)

    def inside(masks, others):
        joined = pack_masks(masks) & pack_masks(others)
        return joined.area, joined[2:].boxes, unpack_masks(joined.crop(3, 4, 40, 30))

    for one, two in zip(torch.compile(inside, fullgraph=True)(masks, others), inside(masks, others)):
        assert torch.equal(one, two)

    def across(packed):
        return packed | packed[:1]

    packed = pack_masks(masks)
    assert torch.equal(torch.compile(across, fullgraph=True)(packed).words, across(packed).words)


def test_exports_with_packed_masks_across():
    class Join(torch.nn.Module):
        def forward(self, packed):
            return packed & packed[:1], packed.area

    packed = pack_masks(ellipses(6, 40, 50))
    joined, area = torch.export.export(Join(), (packed,)).module()(packed)
    assert torch.equal(joined.words, (packed & packed[0]).words) and torch.equal(area, packed.area)


# --- errors ---

MASKS = torch.zeros(2, 4, 40, dtype=torch.bool)
PACKED = pack_masks(MASKS)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pack_masks([1]), TypeError, "pack_masks: masks is list; allowed: torch.Tensor"),
        (lambda: pack_masks(MASKS.float()), ValueError, "threshold=None; allowed with floating masks: a number"),
        (lambda: pack_masks(MASKS, 0.5), ValueError, "threshold=0.5; allowed with bool masks: None"),
        (lambda: pack_masks(MASKS.float(), torch.nan), ValueError, "threshold=nan; allowed: a number that is not NaN"),
        (lambda: pack_masks(MASKS.float(), "0.5"), TypeError, "threshold='0.5'; allowed: a number"),
        (lambda: pack_masks(MASKS.int()), RuntimeError, "masks has dtype int32; allowed: bool, uint8, float32"),
        (lambda: pack_masks(MASKS[0, 0]), RuntimeError, r"masks has shape \(40,\); allowed: \(N, H, W\)"),
        (lambda: pack_masks(MASKS.view(1, 2, 4, 40)), RuntimeError, r"shape \(1, 2, 4, 40\); allowed"),
        (lambda: unpack_masks(MASKS), TypeError, "unpack_masks: packed is Tensor; allowed: PackedMasks"),
        (lambda: unpack_masks(PACKED, torch.int64), ValueError, "dtype=torch.int64; allowed: torch.bool"),
        (lambda: PackedMasks(MASKS, 40), RuntimeError, "PackedMasks: words has dtype bool; allowed: int32"),
        (lambda: PackedMasks(MASKS.int(), 40), RuntimeError, r"words has shape \(2, 4, 40\); allowed: \(N, H, 2\)"),
        (lambda: PackedMasks(PACKED.words, -1), ValueError, "width=-1; allowed: 0 to 2147483647"),
        (lambda: PackedMasks(PACKED.words[:0, :, :1].expand(0, 4, 2**26), 2**31), ValueError, "width=2147483648; al"),
        (lambda: pack_masks(MASKS[:1, :1, :1].expand(1, 1, 2**31)), ValueError, "1 x 2147483648 pixels; allowed: "),
        (lambda: pack_masks(MASKS[:1, :1, :1].expand(1, 2**31, 1)), ValueError, "2147483648 x 1 pixels; allowed: "),
        (lambda: PackedMasks(PACKED.words, 40.0), TypeError, "width=40.0; allowed: an int"),
        (lambda: PackedMasks(PACKED.words - 1, 40), RuntimeError, "words has bits set past pixel 39"),
        (lambda: PACKED[2], IndexError, "index=2; allowed: -2 to 1"),
        (lambda: PACKED[[0, -3]], IndexError, "index=-3; allowed: -2 to 1"),
        (lambda: PACKED[True], TypeError, "index=True; allowed: an int, a slice"),
        (lambda: PACKED["a"], TypeError, "index='a'; allowed: an int, a slice"),
        (lambda: PACKED[0, 1], TypeError, r"index=\(0, 1\); allowed: an int, a slice"),
        (lambda: PACKED[torch.ones(3, dtype=torch.bool)], RuntimeError, r"index has shape \(3,\); allowed: \(2\)"),
        (lambda: PACKED[torch.ones(3)], IndexError, "index has dtype float32"),
        (lambda: PACKED[torch.zeros(1, 1, dtype=torch.int64)], IndexError, r"shape \(1, 1\); allowed: a 1-d tensor"),
        (lambda: PACKED & pack_masks(MASKS[:, :3]), RuntimeError, "other holds masks of 3 x 40; allowed: 4 x 40"),
        (lambda: PACKED & pack_masks(MASKS[[0, 0, 0]]), RuntimeError, "other holds 3 masks; allowed: 2, or one"),
        (lambda: PACKED & MASKS, TypeError, "unsupported operand"),
        (lambda: PackedMasks.cat([]), TypeError, r"cat: masks is \[\]; allowed: a list of one PackedMasks or more"),
        (lambda: PackedMasks.cat([PACKED, MASKS]), TypeError, r"masks is \[PackedMasks, Tensor\]"),
        (lambda: PackedMasks.cat([PACKED, pack_masks(MASKS[..., 1:])]), RuntimeError, "of 4 x 39; allowed: 4 x 40"),
        (lambda: PACKED.crop(0, 0, 41, 4), ValueError, r"crop: window=\(0, 0, 41, 4\); allowed: 0 <= x1 <= x2 <= 40"),
        (lambda: PACKED.crop(3, 0, 2, 4), ValueError, r"window=\(3, 0, 2, 4\)"),
        (lambda: PACKED.crop(0.5, 0, 2, 4), TypeError, "window=.*; allowed: four ints"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_public_names():
    assert fastseg.ops.PackedMasks is PackedMasks
