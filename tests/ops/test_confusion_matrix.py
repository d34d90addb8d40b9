"""confusion_matrix: against a count in NumPy, over layouts, dtypes, hostile labels and backends."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseg
from fastseg._dtypes import LABELS
from fastseg.ops import confusion_matrix
from tests.contract import Case, Contract

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("auto", "reference")


def brute_force(input, target, num_classes=None, ignore_index=-100):
    """One pixel after the other. Raises IndexError for a label out of range."""
    prediction = input.argmax(1) if input.is_floating_point() else input
    num_classes = num_classes or input.size(1)
    counts = numpy.zeros((num_classes, num_classes), dtype=numpy.int64)
    for row, column in zip(target.flatten().tolist(), prediction.flatten().tolist()):
        if row == ignore_index:
            continue
        if not (0 <= row < num_classes and 0 <= column < num_classes):
            raise IndexError(f"label out of range: {row}, {column}")
        counts[row, column] += 1
    return torch.from_numpy(counts)


def logits_case(*shape, ignored=None):
    def arguments(make):
        target = make.labels(shape[0], *shape[2:], classes=shape[1], ignored=ignored)
        return dict(input=make.floating(*shape), target=target, ignore_index=-100 if ignored is None else ignored)

    return arguments


CONTRACTS = [
    Contract(
        function=fastseg.ops.confusion_matrix,
        stock=brute_force,
        cases=[
            Case("image", logits_case(2, 5, 7, 9, ignored=255)),
            Case("volume", logits_case(2, 3, 4, 5, 6, ignored=1)),
            Case("rows", logits_case(33, 4)),
            Case("two classes", logits_case(1, 2, 40, 40, ignored=-1)),
            Case("many classes", logits_case(1, 70, 12, 11)),
            Case("empty batch", logits_case(0, 5, 7, 9)),
            Case("empty image", logits_case(2, 5, 0, 9)),
        ],
        rejected=(torch.int16, torch.bool, torch.complex64),
        exact=True,
    )
]


def random_labels(shape, classes, dtype, seed=0):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("input_dtype", LABELS)
@pytest.mark.parametrize("target_dtype", LABELS)
def test_labels_of_every_dtype(input_dtype, target_dtype, backend, device):
    prediction = random_labels((3, 37, 41), 19, input_dtype, seed=1)
    target = random_labels((3, 37, 41), 21, target_dtype, seed=2)
    target[target == 20] = 255
    target[target == 19] = 0
    expected = brute_force(prediction, target, 19, ignore_index=255)
    result = confusion_matrix(prediction.to(device), target.to(device), 19, ignore_index=255, backend=backend)
    assert result.dtype == torch.int64
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("classes", [1, 2, 32, 33, 46, 150, 300])
@pytest.mark.parametrize("pixels", [1, 15, 16, 511, 512, 513, 70000])
def test_class_counts_and_sizes(classes, pixels, device):
    prediction = random_labels((pixels,), classes, torch.int64, seed=1)
    target = random_labels((pixels,), classes, torch.int64, seed=2)
    expected = torch.bincount(target * classes + prediction, minlength=classes * classes).view(classes, classes)
    assert torch.equal(confusion_matrix(prediction.to(device), target.to(device), classes).cpu(), expected)


@pytest.mark.parametrize("pixels", [70000, 200000])  # without and with histograms
def test_patches_of_many_classes_with_ignored_pixels(pixels, device):
    patches = random_labels((2, pixels // 40), 150, torch.int64)
    prediction, target = patches.repeat_interleave(40, dim=1)
    target[7::31] = 255
    expected = confusion_matrix(prediction, target, 150, ignore_index=255, backend="reference")
    result = confusion_matrix(prediction.to(device), target.to(device), 150, ignore_index=255)
    assert torch.equal(result.cpu(), expected) and expected.sum() == (target != 255).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("classes", [1, 3, 16, 19, 150])
def test_logits_in_every_layout(classes, layout, dtype, backend, device):
    """Many equal maxima, and blocks of pixels that end within an image or cross into the next."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(-4, 5, (3, classes, 23, 29), generator=generator).to(device, dtype)
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        logits = torch.cat([logits, logits], 3)[..., ::2]
    target = random_labels((3, 23, 29), classes, torch.int64).to(device)
    expected = confusion_matrix(logits.argmax(1), target, classes, backend="reference")
    assert torch.equal(confusion_matrix(logits, target, backend=backend), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nan_is_the_maximum_and_the_first_maximum_wins(layout, dtype, device):
    nan, inf = float("nan"), float("inf")
    pixels = [
        [0.0, -0.0, 0.0],
        [-0.0, 0.0, 1.0],
        [1.0, nan, inf],
        [nan, 2.0, nan],
        [-inf, -inf, -inf],
        [-inf, nan, nan],
        [inf, inf, nan],
        [inf, 1.0, inf],
    ]
    logits = torch.tensor(pixels, dtype=dtype, device=device).T.reshape(1, 3, 2, 4).contiguous(memory_format=layout)
    target = torch.zeros(1, 2, 4, dtype=torch.int64, device=device)
    for pixel, values in enumerate(pixels):
        target.view(-1)[pixel] = int(torch.tensor(values).argmax())
    result = confusion_matrix(logits, target)
    assert torch.equal(result, torch.bincount(target.flatten(), minlength=3).diag())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LABELS)
def test_ignore_index_outside_the_labels_dtype_ignores_nothing(dtype, backend):
    """-100 is 156 modulo 256, and 2^32 + 1 is 1 modulo 2^32: neither must hide those labels."""
    target = torch.tensor([156, 1], dtype=dtype)
    for ignore_index in (-100, 2**32 + 1):
        result = confusion_matrix(target, target, 200, ignore_index=ignore_index, backend=backend)
        assert result.sum() == 2


HOSTILE = [
    -(2**63),
    -(2**31) - 1,
    -(2**31),
    -101,
    -2,
    -1,
    19,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**32 + 3,
    2**63 - 1,
]


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["target", "input"])
@pytest.mark.parametrize("label", HOSTILE)
@pytest.mark.parametrize("pixels", [100, 40000])  # without and with a histogram
def test_label_out_of_range_is_an_index_error(pixels, label, where, backend):
    labels = {"target": torch.zeros(pixels, dtype=torch.int64), "input": torch.zeros(pixels, dtype=torch.int64)}
    labels[where][-43] = label
    with pytest.raises(IndexError, match="allowed: 0 to 18"):
        confusion_matrix(**labels, num_classes=19, backend=backend)
    if where == "target":
        result = confusion_matrix(**labels, num_classes=19, ignore_index=label, backend=backend)
    else:
        labels["target"][-43] = -100  # the prediction at an ignored pixel does not count
        result = confusion_matrix(**labels, num_classes=19, backend=backend)
    assert result[0, 0] == pixels - 1 and result.sum() == pixels - 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_labels_equal_the_count_or_raise(data):
    classes = data.draw(st.integers(1, 40), "classes")
    size = data.draw(st.integers(0, 70), "size")
    label = (
        st.integers(0, classes - 1) | st.sampled_from(HOSTILE + [-100])
        if data.draw(st.booleans())
        else st.integers(0, classes - 1)
    )
    make = lambda: torch.tensor(  # noqa: E731
        data.draw(st.lists(label, min_size=size, max_size=size)), dtype=torch.int64
    )
    prediction, target = make(), make()
    ignore_index = data.draw(st.sampled_from([-100, -1, 0, 255, 2**40]), "ignore_index")
    try:
        expected = brute_force(prediction, target, classes, ignore_index)
    except IndexError:
        for backend in BACKENDS:
            with pytest.raises(IndexError):
                confusion_matrix(prediction, target, classes, ignore_index, backend=backend)
        return
    for backend in BACKENDS:
        assert torch.equal(confusion_matrix(prediction, target, classes, ignore_index, backend=backend), expected)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(input=torch.zeros(3), target=torch.zeros(3).long()), ValueError, "num_classes=None"),
        (dict(input=torch.zeros(3).long(), target=torch.zeros(3).long()), ValueError, "num_classes=None"),
        (
            dict(input=torch.zeros(3).long(), target=torch.zeros(4).long(), num_classes=2),
            RuntimeError,
            "target has shape",
        ),
        (
            dict(input=torch.zeros(3).long(), target=torch.zeros(3), num_classes=2),
            RuntimeError,
            "target has dtype float32",
        ),
        (
            dict(input=torch.zeros(3).bool(), target=torch.zeros(3).long(), num_classes=2),
            RuntimeError,
            "input has dtype",
        ),
        (dict(input=torch.zeros(2, 3, 4), target=torch.zeros(2, 5).long()), RuntimeError, "target has shape"),
        (
            dict(input=torch.zeros(2, 3, 4), target=torch.zeros(2, 4).long(), num_classes=4),
            RuntimeError,
            "input has shape",
        ),
        (
            dict(input=torch.zeros(3).long(), target=torch.zeros(3).long(), num_classes=0),
            ValueError,
            "num_classes=0",
        ),
        (
            dict(input=torch.zeros(3).long(), target=torch.zeros(3).long(), num_classes=40000),
            ValueError,
            "1 to 32767",
        ),
        (dict(input=[1], target=torch.zeros(1).long(), num_classes=2), TypeError, "input is list"),
        (dict(num_classes=2.0), TypeError, "num_classes=2.0; allowed: an int"),
        (dict(num_classes=2**70), ValueError, "1 to 32767"),
        (dict(num_classes=2, ignore_index=255.0), TypeError, "ignore_index=255.0; allowed: an integer, or None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=message):
        confusion_matrix(**{"input": labels, "target": labels, **arguments})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [None, 2**70, -(2**70)])
def test_nothing_is_ignored(ignore_index, backend):
    labels = torch.tensor([0, 1, 1])
    assert confusion_matrix(labels, labels, 2, ignore_index, backend=backend).tolist() == [[1, 0], [0, 2]]


@pytest.mark.slow
def test_more_than_two_to_the_32_pixels_in_one_bin():
    """A single slice whose 32-bit counters would overflow."""
    pixels = 2**32 + 5
    labels = torch.zeros(pixels, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = confusion_matrix(labels, labels, 2)
    finally:
        torch.set_num_threads(threads)
    assert result.tolist() == [[pixels, 0], [0, 0]]
