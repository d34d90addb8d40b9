"""masks_to_rle and rle_to_masks: golden strings, against the definition, round trips, malformed input, pycocotools."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.ops import PackedMasks, mask_iou, masks_to_rle, pack_masks, rle_to_masks, unpack_masks
from fastseg.ops.masks.run_lengths import run_overlaps_op, run_statistics_op
from tests.contract import Case, Contract
from tests.ops._masks import WIDTHS, ellipses, noise

BACKENDS = ("auto", "reference")


def runs_of(mask):
    """The lengths of runs of equal pixels, column by column, zeros first."""
    counts = [[len([*run]), value] for value, run in itertools.groupby(mask.T.flatten().tolist())]
    return ([0] if counts and counts[0][1] else []) + [length for length, _ in counts] or [0]


def counts_of_floats(masks, backend="auto"):
    rles = masks_to_rle(pack_masks(masks, 0, backend=backend), compressed=False, backend=backend)
    return torch.tensor([count for rle in rles for count in rle["counts"]], dtype=torch.int64)


CONTRACTS = [
    Contract(
        function=counts_of_floats,
        stock=lambda masks: torch.tensor([count for mask in masks.detach() > 0 for count in runs_of(mask)]).long(),
        name="masks_to_rle",
        cases=[
            Case("masks", lambda make: dict(masks=make.floating(3, 6, 40))),
            Case("no masks", lambda make: dict(masks=make.floating(0, 6, 40))),
        ],
        exact=True,
        compile_whole=False,
    )
]


def rows(*text):
    return torch.tensor([[character == "1" for character in row] for row in text])


GOLDEN = [
    (rows("0110", "0110", "0001"), [3, 2, 1, 2, 3, 1], b"32102O"),
    (rows("1100", "1100", "0000"), [0, 2, 1, 2, 7], b"02106"),
    (rows("0000", "0000", "0000"), [12], b"<"),
    (rows("1111", "1111", "1111"), [0, 12], b"0<"),
    (rows("000000", "011100", "011100", "000000", "000000"), [6, 2, 3, 2, 3, 2, 12], b"6230009"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask, counts, text", GOLDEN)
def test_golden(mask, counts, text, backend, device):
    size = [*mask.shape]
    packed = pack_masks(mask.to(device))
    assert masks_to_rle(packed, backend=backend) == [{"size": size, "counts": text}]
    assert masks_to_rle(packed, False, backend=backend) == [{"size": size, "counts": counts}]
    for given_counts in (text, text.decode(), counts, tuple(counts), numpy.array(counts, dtype=numpy.uint32)):
        decoded = rle_to_masks({"size": size, "counts": given_counts}, backend=backend)
        assert torch.equal(unpack_masks(decoded)[0], mask)


def test_golden_square():
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, 10:60, 20:70] = True
    text = masks_to_rle(mask)[0]["counts"]
    assert text.startswith(b"jn1b1b1") and text.endswith(b"^m2") and set(text[7:-3]) == {ord("0")}


@pytest.mark.sanitized
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("height", [1, 2, 31, 45])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.98])
def test_every_width(width, height, density, device):
    masks = noise(5, height, width, density=density)
    packed = pack_masks(masks.to(device))
    plain = masks_to_rle(packed, compressed=False)
    assert [rle["counts"] for rle in plain] == [runs_of(mask) for mask in masks]
    text = masks_to_rle(packed)
    assert text == masks_to_rle(packed.cpu(), backend="reference")
    for rles in (plain, text, [*plain[:2], *text[2:]]):
        decoded = rle_to_masks(rles, device=device)
        assert torch.equal(decoded.words, packed.words) and decoded.shape == packed.shape


def test_masks_at_the_borders(device):
    """Runs that continue from the bottom of a column at the top of the next one."""
    for height, width in ((1, 1), (1, 70), (70, 1), (3, 64), (40, 33)):
        masks = torch.zeros(6, height, width, dtype=torch.bool)
        masks[0, -1], masks[1, 0], masks[2, :, 0], masks[3, :, -1] = True, True, True, True
        masks[4, -1, : width // 2], masks[5, 0, width // 2 :] = True, True
        plain = masks_to_rle(masks.to(device), compressed=False)
        assert [rle["counts"] for rle in plain] == [runs_of(mask) for mask in masks]
        assert torch.equal(unpack_masks(rle_to_masks(plain)), masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_everything(backend):
    for shape in ((0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)):
        masks = torch.zeros(shape, dtype=torch.bool)
        plain = masks_to_rle(masks, False, backend=backend)
        assert plain == [{"size": [*shape[1:]], "counts": [0]}] * shape[0]
        for rles in (plain, masks_to_rle(masks, backend=backend)):
            assert rle_to_masks(rles, shape[1:], backend=backend).shape == shape


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 20), st.integers(1, 70), st.floats(0, 1), st.integers(0, 2**32))
def test_round_trips(count, height, width, density, seed):
    packed = pack_masks(torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < density)
    for compressed in (True, False):
        decoded = rle_to_masks(masks_to_rle(packed, compressed), (height, width))
        assert torch.equal(decoded.words, packed.words)


@pytest.mark.sanitized
def test_runs_of_no_length(device):
    """Counts of 0, which other programs write: the pixel changes and changes back."""
    counts = [3, 0, 1, 2, 0, 0, 0, 1, 5]
    decoded = unpack_masks(rle_to_masks({"size": [3, 4], "counts": counts}))[0]
    assert decoded.T.flatten().tolist() == [False] * 4 + [True] * 3 + [False] * 5


@pytest.mark.sanitized
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12), st.integers(0, 6), st.integers(0, 40))
def test_any_text_equals_the_definition_or_raises(text, height, width):
    check_both({"size": [height, width], "counts": text})


@pytest.mark.sanitized
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(48, 111), max_size=10), st.integers(0, 6), st.integers(0, 40))
def test_any_characters_of_the_encoding(characters, height, width):
    check_both({"size": [height, width], "counts": bytes(characters)})


@pytest.mark.sanitized
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12) | st.integers(-(2**70), 2**70), max_size=8), st.integers(0, 4), st.integers(0, 40))
def test_any_counts(counts, height, width):
    check_both({"size": [height, width], "counts": counts})


def check_both(rle):
    """The kernels and the definition give the same masks, or errors that name the argument."""
    found = []
    for backend in BACKENDS:
        try:
            found.append(rle_to_masks(rle, backend=backend).words.tolist())
        except (ValueError, TypeError) as error:
            assert "fastseg.ops.rle_to_masks: rles[0]['counts']" in str(error)
            found.append(str(error))
    assert found[0] == found[1]


SIZE = [3, 4]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rles, error, message",
    [
        ([{"size": SIZE, "counts": b"32102O"}, {"size": SIZE, "counts": b"3210"}], ValueError,
         r"rles\[1\]\['counts'\] add up to 8; allowed: 12, 3 x 4"),
        ([{"size": SIZE, "counts": b"32102OO"}], ValueError, r"rles\[0\]\['counts'\].* out of range|add up to"),
        ([{"size": SIZE, "counts": b"32102o"}], ValueError, r"counts'\]=b'32102o' ends within a count"),
        ([{"size": SIZE, "counts": b"32 02O"}], ValueError, "holds a character that is none of the encoding"),
        ([{"size": SIZE, "counts": "32\u00e902O"}], ValueError, "holds a character that is none of the encoding"),
        ([{"size": SIZE, "counts": "32\ud80002O"}], ValueError, "holds a character that is none of the encoding"),
        ([{"size": SIZE, "counts": b"O<1"}], ValueError, "holds a count out of range; allowed: 0 to 2147483647"),
        ([{"size": SIZE, "counts": b"ooooooo0"}], ValueError, "holds a count out of range"),
        ([{"size": SIZE, "counts": [13]}], ValueError, r"rles\[0\]\['counts'\] holds 13; allowed: 0 to 12"),
        ([{"size": SIZE, "counts": [13, -1]}], ValueError, "holds -1; allowed: 0 to 12"),
        ([{"size": SIZE, "counts": [10, 3]}], ValueError, "add up to 13; allowed: 12"),
        ([{"size": SIZE, "counts": []}], ValueError, "add up to 0; allowed: 12"),
        ([{"size": SIZE, "counts": [12.0]}], TypeError, "allowed: bytes, str, or ints"),
        ([{"size": SIZE, "counts": [True] * 12}], TypeError, "allowed: bytes, str, or ints"),
        ([{"size": SIZE, "counts": [2**80]}], TypeError, "allowed: bytes, str, or ints"),
        ([{"size": SIZE, "counts": [[12]]}], TypeError, "allowed: bytes, str, or ints"),
        ([{"size": SIZE, "counts": None}], TypeError, "allowed: bytes, str, or ints"),
        ([{"size": SIZE}], TypeError, r"rles\[0\]=.*; allowed: .\"size\": \[H, W\]"),
        ([7], TypeError, r"rles\[0\]=7; allowed"),
        ("12", TypeError, "rles is str; allowed: a list of dictionaries, or one"),
        (7, TypeError, "rles is int; allowed: a list of dictionaries, or one"),
        ([], ValueError, r"size=None; allowed without any rles: \(H, W\)"),
        ([{"size": [3], "counts": [3]}], ValueError, r"rles\[0\]\['size'\]=\[3\]; allowed: two ints of 0 or more"),
        ([{"size": [-3, 4], "counts": [3]}], ValueError, "allowed: two ints of 0 or more"),
        ([{"size": [3.0, 4], "counts": [12]}], TypeError, r"rles\[0\]\['size'\]=.*; allowed: two ints"),
        ([{"size": SIZE, "counts": [12]}, {"size": [4, 3], "counts": [12]}], ValueError,
         r"rles\[1\]\['size'\]=\[4, 3\]; allowed: \[3, 4\], as before"),
        ([{"size": [2**16, 2**16], "counts": [2**32]}], ValueError, "masks of 65536 x 65536; allowed: at most"),
    ],
)  # fmt: skip
def test_malformed_input_is_named(rles, error, message, backend):
    with pytest.raises(error, match=f"fastseg.ops.rle_to_masks: .*{message}|fastseg.ops.rle_to_masks: {message}"):
        rle_to_masks(rles, backend=backend)


def test_a_size_that_masks_do_not_have():
    with pytest.raises(ValueError, match=r"rles\[0\]\['size'\]=\[3, 4\]; allowed: \[4, 3\], as before"):
        rle_to_masks({"size": [3, 4], "counts": [12]}, (4, 3))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: masks_to_rle([1]), TypeError, "masks is list; allowed: PackedMasks"),
        (lambda: masks_to_rle(torch.zeros(1, 2, 2)), RuntimeError, "masks has dtype float32"),
        (lambda: masks_to_rle(GOLDEN[0][0][None], "utf8"), TypeError, "compressed='utf8'; allowed: True or False"),
        (
            lambda: masks_to_rle(PackedMasks(torch.zeros(0, 2**20, 2**11, dtype=torch.int32), 2**16)),
            ValueError,
            "masks of 1048576 x 65536; allowed: at most 2147483647 pixels",
        ),
    ],
)
def test_bad_masks_are_named(call, error, message):
    with pytest.raises(error, match=f"fastseg.ops.masks_to_rle: {message}"):
        call()


def test_equals_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    for masks in (ellipses(20, 97, 133), noise(20, 97, 133), noise(5, 1, 7), noise(5, 700, 3, density=0.001)):
        fortran = numpy.asfortranarray(masks.permute(1, 2, 0).byte().numpy())
        expected = coco.encode(fortran)
        rles = masks_to_rle(masks)
        assert rles == [{"size": [*rle["size"]], "counts": rle["counts"]} for rle in expected]
        assert torch.equal(unpack_masks(rle_to_masks(expected)), masks)
        assert numpy.array_equal(coco.decode(rles), fortran)
        assert coco.area(rles).tolist() == pack_masks(masks).area.tolist()


@pytest.mark.parametrize("height, width", [(1, 40), (7, 1), (9, 33)])
def test_areas_and_overlaps_of_runs(height, width):
    """Masks that begin with ones, empty masks, full masks, and runs of length 0."""
    masks = torch.cat(
        [
            noise(6, height, width),
            ellipses(4, height, width),
            torch.ones(2, height, width).bool(),
            torch.zeros(1, height, width).bool(),
        ]
    )
    lists = [rle["counts"] for rle in masks_to_rle(masks, compressed=False)]
    lists[0] = [0, 0, *lists[0][:1], 0, 0, *lists[0][1:], 0]
    lengths = torch.tensor([len(counts) for counts in lists])
    counts, ends = torch.tensor([count for counts in lists for count in counts]), lengths.cumsum(0)
    first, second = torch.cartesian_prod(torch.arange(len(masks)), torch.arange(len(masks))).T
    expected = mask_iou(masks, metric="intersection").flatten()
    for backend in BACKENDS:
        pixels, area = run_statistics_op(counts, ends - lengths, ends, backend=backend)
        assert pixels.unique().tolist() == [height * width] and torch.equal(area, masks.sum((1, 2)))
        shared = run_overlaps_op(counts, ends - lengths, ends, first, second, backend=backend)
        assert torch.equal(shared, expected)


@pytest.mark.sanitized
def test_hostile_runs_and_pairs():
    """Any call through torch.ops gives an error or a number, and reads nothing outside of the lists."""
    huge = 2**63 - 1
    counts, one, two = (torch.tensor(values) for values in ([huge, huge, -huge, 5, huge, huge], [0, 3], [3, 6]))
    overlaps, statistics = torch.ops.fastseg.run_overlaps, torch.ops.fastseg.run_statistics
    overlaps(counts, one, two, torch.tensor([0, 1]), torch.tensor([1, 0])), statistics(counts, one, two)
    for begins, ends in (([-1, 0], [3, 6]), ([0, 3], [3, 7]), ([2, 0], [1, 6]), ([0], [3, 6]), ([huge, 0], [-huge, 6])):
        begins, ends = torch.tensor(begins), torch.tensor(ends)
        with pytest.raises(
            RuntimeError, match="do not lie in counts|ends must be a contiguous int64 CPU tensor with 1 elements"
        ):
            statistics(counts, begins, ends)
    for pair in ([-1, 2], [0, huge]):
        with pytest.raises(RuntimeError, match="a mask that is not there"):
            overlaps(counts, one, two, torch.tensor(pair), torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="second must be a contiguous int64 CPU tensor with 1 elements"):
        overlaps(counts, one, two, torch.tensor([0]), torch.tensor([0, 0]))


def test_areas_come_with_the_masks():
    masks = noise(3, 9, 40)
    assert torch.equal(rle_to_masks(masks_to_rle(masks))._area, masks.sum((1, 2)))
