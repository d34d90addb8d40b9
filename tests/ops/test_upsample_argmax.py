"""upsample_argmax against torch.nn.functional.interpolate(...).argmax(1)."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from fastseg.ops import upsample_argmax
from fastseg.testing import allowed_error, assert_within_policy
from tests.contract import Case, Contract

HALF = (torch.float16, torch.bfloat16)


def stock(input, size=None, scale_factor=None, align_corners=False, dtype=torch.int64, return_probability=False):
    """The function replaced. Half inputs are interpolated in fp32: rounding every logit to half would create ties."""
    logits = input.float() if input.dtype in HALF else input
    logits = F.interpolate(logits, size, scale_factor, mode="bilinear", align_corners=align_corners)
    labels = logits.argmax(1).to(dtype)
    return (labels, logits.softmax(1).amax(1).float()) if return_probability else labels


CONTRACTS = [
    Contract(
        upsample_argmax,
        stock,
        [
            Case("x8", lambda make: dict(input=make.floating(2, 5, 4, 6), scale_factor=8)),
            Case("size", lambda make: dict(input=make.floating(1, 3, 5, 7), size=(13, 40))),
            Case("align_corners", lambda make: dict(input=make.floating(2, 4, 5, 3), size=(9, 21), align_corners=True)),
            Case("same_size", lambda make: dict(input=make.floating(1, 3, 4, 5), size=(4, 5))),
            Case("smaller", lambda make: dict(input=make.floating(1, 3, 20, 30), scale_factor=(0.3, 0.7))),
            Case("bytes", lambda make: dict(input=make.floating(1, 3, 4, 4), size=17, dtype=torch.uint8)),
            Case("no_image", lambda make: dict(input=make.floating(0, 3, 4, 4), size=8)),
        ],
        exact=True,
    )
]


def check_labels(input, agreeing=0.999, **arguments):
    """Every label's fp64 logit is the largest up to rounding, and nearly every label is the fp64 one."""
    labels = upsample_argmax(input, **arguments)
    exact = F.interpolate(input.double(), mode="bilinear", **arguments)
    single = F.interpolate(input.float(), mode="bilinear", **arguments)
    chosen = exact.gather(1, labels[:, None])[:, 0]
    assert (exact.amax(1) - chosen).max() <= 2 * allowed_error(single, exact)
    assert (labels == exact.argmax(1)).double().mean() >= agreeing


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "shape, arguments",
    [
        ((2, 19, 16, 32), dict(scale_factor=8)),
        ((2, 19, 16, 32), dict(scale_factor=8, align_corners=True)),
        ((1, 21, 17, 33), dict(size=(129, 257), align_corners=True)),
        ((1, 21, 33, 17), dict(scale_factor=(7.3, 11.9))),
        ((1, 150, 13, 70), dict(scale_factor=4)),
        ((1, 1000, 3, 20), dict(scale_factor=8)),
        ((1, 2, 40, 40), dict(scale_factor=(3, 32))),
        ((2, 7, 30, 200), dict(size=(300, 150))),
        ((1, 19, 64, 100), dict(scale_factor=0.37)),
        ((1, 5, 3, 3000), dict(size=(30, 3100))),
    ],
)
def test_labels_are_those_of_the_largest_logit(shape, arguments, dtype, channels_last):
    input = torch.randn(shape).to(dtype)
    check_labels(input.to(memory_format=torch.channels_last) if channels_last else input, **arguments)


def blobs(classes, height, width, generator=None):
    """Logits like those of a trained network: a few large regions, so that nearly all classes are pruned."""
    coarse = 4 * torch.randn(2, classes, max(2, height // 8), max(2, width // 8), generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


@pytest.mark.parametrize("scale_factor", [3, 4, 8, 16, 5.5])
@pytest.mark.parametrize("align_corners", [False, True])
def test_smooth_logits(scale_factor, align_corners):
    check_labels(blobs(19, 24, 40), scale_factor=scale_factor, align_corners=align_corners)


@pytest.mark.parametrize("scale_factor", [1, 2, 4, 8, 16, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_first_maximum_wins_ties(scale_factor, dtype):
    """Small whole numbers and power-of-two scales: every product and sum is exact, so equality is exact equality."""
    input = torch.randint(-2, 3, (2, 9, 24, 40)).to(dtype)
    expected = stock(input, scale_factor=scale_factor)
    logits = F.interpolate(input.double(), scale_factor=scale_factor, mode="bilinear").topk(2, dim=1).values
    assert (logits[:, 0] == logits[:, 1]).double().mean() > 0.01, "the data has no ties"
    assert torch.equal(upsample_argmax(input, scale_factor=scale_factor), expected)


def test_equal_classes_give_the_first():
    for value in (0.0, -3.5, 1e30, float("inf"), float("-inf"), float("nan")):
        labels = upsample_argmax(torch.full((1, 6, 5, 5), value), scale_factor=8)
        assert (labels == 0).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "arguments",
    [dict(scale_factor=8), dict(size=(24, 40)), dict(size=(47, 79), align_corners=True), dict(scale_factor=0.5)],
)
def test_hostile_values(value, arguments):
    input = torch.randint(-8, 9, (2, 5, 24, 40)).float()
    input[torch.rand(input.shape) < 0.02] = value
    assert torch.equal(upsample_argmax(input, **arguments), stock(input, **arguments))


LAYOUTS = ("planes", "channels_last", "some of the channels", "columns first", "expanded", "rows apart")


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("classes", [1, 2, 3, 21, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_keep_their_size(layout, classes, dtype):
    """Neither whole vectors nor whole tiles of pixels, ties, NaN and infinities, in every order of memory."""
    logits = torch.randint(-8, 9, (3, classes, 7, 45)).to(dtype)
    for value in (float("nan"), float("inf"), float("-inf")):
        logits[torch.rand(logits.shape) < 0.3 / classes] = value
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "some of the channels":
        logits = torch.cat([logits, logits], 1).to(memory_format=torch.channels_last)[:, classes:]
    elif layout == "columns first":
        logits = logits.mT.contiguous().mT
    elif layout == "expanded":
        logits = logits[:1].expand(3, -1, -1, -1)
    elif layout == "rows apart":
        logits = logits[:, :, 1:6, 2:40]
    for label_type in (torch.int64, torch.uint8) if classes <= 256 else (torch.int64,):
        arguments = dict(size=logits.shape[2:], dtype=label_type)
        assert torch.equal(upsample_argmax(logits, **arguments), stock(logits, **arguments))


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_logits_whose_difference_overflows(value):
    input = torch.randn(2, 5, 24, 40)
    input[torch.rand(input.shape) < 0.02] = value
    input[0, 3, 5:7, 5] = torch.tensor([3e38, -3e38])
    check_labels(input, agreeing=0.99, scale_factor=8)


def test_a_class_masked_out_by_infinity():
    input = torch.randn(1, 5, 8, 8)
    input[:, 2] = float("-inf")
    labels = upsample_argmax(input, scale_factor=8)
    assert torch.equal(labels, stock(input, scale_factor=8))
    assert (labels[:, 4:-4, 4:-4] != 2).all()  # at the border 0 times it is NaN, as in PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape, scale_factor", [((2, 19, 9, 21), 8), ((1, 150, 6, 5), 5.3), ((1, 3, 20, 20), 0.4)])
def test_probability(shape, scale_factor, dtype):
    input = (3 * torch.randn(shape)).to(dtype)
    labels, probability = upsample_argmax(input, scale_factor=scale_factor, return_probability=True)
    assert torch.equal(labels, upsample_argmax(input, scale_factor=scale_factor))
    exact = F.interpolate(input.double(), scale_factor=scale_factor, mode="bilinear").softmax(1).amax(1)
    single = F.interpolate(input.float(), scale_factor=scale_factor, mode="bilinear").softmax(1).amax(1)
    assert_within_policy(probability, single, exact)


def test_probability_of_hostile_values():
    input = torch.randn(1, 4, 6, 6)
    input[0, 1, 1, 1], input[0, 2, 4, 4], input[0, 3, 1, 4] = float("nan"), float("inf"), float("-inf")
    labels, probability = upsample_argmax(input, scale_factor=8, return_probability=True)
    stock_labels, stock_probability = stock(input, scale_factor=8, return_probability=True)
    assert torch.equal(labels, stock_labels)
    exact = F.interpolate(input.double(), scale_factor=8, mode="bilinear").softmax(1).amax(1)
    assert stock_probability.isnan().any() and not stock_probability.isnan().all()
    assert_within_policy(probability, stock_probability, exact)


@settings(max_examples=100, deadline=None)
@given(
    classes=st.integers(1, 40),
    source=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 150)),
    align_corners=st.booleans(),
    dtype=st.sampled_from([torch.float32, *HALF]),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "expanded"]),
    whole=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_size(classes, source, size, align_corners, dtype, layout, whole, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, classes, *source)
    if layout == "transposed":
        input = torch.randn(2, classes, source[1], source[0], generator=generator).transpose(2, 3)
    elif layout == "expanded":
        input = torch.randn(2, classes, source[0], 1, generator=generator).expand(shape)
    else:
        input = blobs(classes, *source, generator)
    input = (input.round() if whole else input).to(dtype)
    if layout == "channels_last":
        input = input.to(memory_format=torch.channels_last)
    check_labels(input, agreeing=0.0, size=size, align_corners=align_corners)
    labels = upsample_argmax(input, size, align_corners=align_corners)
    small = upsample_argmax(input, size, align_corners=align_corners, dtype=torch.uint8)
    assert torch.equal(small.long(), labels)


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    scales=st.tuples(st.floats(0.2, 12), st.floats(0.2, 12)),
)
def test_any_scale_factor(source, scales):
    input = torch.randn(1, 4, *source)
    if min(int(source[0] * scales[0]), int(source[1] * scales[1])) == 0:
        with pytest.raises(ValueError, match="scale_factor"):
            upsample_argmax(input, scale_factor=scales)
    else:
        check_labels(input, agreeing=0.0, scale_factor=scales)


def test_the_number_of_threads_changes_nothing():
    input = blobs(19, 60, 80)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = upsample_argmax(input, scale_factor=8)
        torch.set_num_threads(2)
        two = upsample_argmax(input, scale_factor=8)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_many_classes_are_cut_into_tiles():
    """Wide and with many classes: source rows are staged in several tiles."""
    check_labels(torch.randn(1, 300, 4, 450), scale_factor=3)


def test_large_label_maps_are_streamed():
    check_labels(torch.randn(1, 3, 130, 131), scale_factor=8)


def test_no_gradient_flows():
    input = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels, probability = upsample_argmax(input, scale_factor=2, return_probability=True)
    assert not labels.requires_grad and not probability.requires_grad


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(), ValueError, "size and scale_factor"),
        (dict(size=4, scale_factor=2), ValueError, "size and scale_factor"),
        (dict(size=0), ValueError, "size=0"),
        (dict(size=4.7), TypeError, "size=4.7; allowed: an integer, or one each for height and width"),
        (dict(size="ab"), TypeError, "size='ab'"),
        (dict(size=(4, 5, 6)), ValueError, r"size=\(4, 5, 6\)"),
        (dict(scale_factor=-1.0), ValueError, "scale_factor=-1.0"),
        (dict(scale_factor=float("nan")), ValueError, "scale_factor=nan"),
        (dict(scale_factor=float("inf")), ValueError, "scale_factor=inf"),
        (dict(size=4, dtype=torch.int32), ValueError, "dtype=torch.int32; allowed: torch.int64, torch.uint8"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_argmax(torch.randn(1, 3, 4, 4), **arguments)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 0, 4, 4), (1, 3, 0, 4), (1, 3, 4, 0), (1, 2, 3, 4, 5)])
def test_bad_shapes(shape):
    with pytest.raises(RuntimeError, match="input has shape"):
        upsample_argmax(torch.randn(shape), size=(4, 4))


def test_bad_inputs():
    with pytest.raises(TypeError, match="input is list"):
        upsample_argmax([[1.0]], size=4)
    with pytest.raises(ValueError, match="uint8 for 257 classes; allowed: up to 256"):
        upsample_argmax(torch.randn(1, 257, 2, 2), size=4, dtype=torch.uint8)
    assert upsample_argmax(torch.eye(256)[None, :, None], size=(1, 256), dtype=torch.uint8)[0, 0, 255] == 255
