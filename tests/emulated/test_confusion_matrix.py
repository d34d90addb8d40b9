"""The CUDA kernels of confusion_matrix, run on the CPU."""

import pytest
import torch

from fastseg.kernels.confusion_matrix.reference import confusion_matrix as reference

LABELS = (torch.uint8, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def kernel(input, target, classes, ignore_index):
    counts = torch.full((classes, classes), -7)
    torch.ops.fastseg_emulator._confusion_matrix(input, target, classes, ignore_index, counts)
    return counts


def labels(shape, classes, dtype=torch.int64, ignored=None):
    values = torch.randint(classes, shape)
    if ignored is not None:
        values[torch.rand(shape) < 0.2] = ignored
    return values.to(dtype)


@pytest.mark.parametrize("input_dtype", LABELS)
@pytest.mark.parametrize("target_dtype", LABELS)
def test_labels_of_every_dtype(input_dtype, target_dtype):
    prediction = labels((3, 37, 41), 19, input_dtype)
    target = labels((3, 37, 41), 19, target_dtype, ignored=255)
    assert torch.equal(kernel(prediction, target, 19, 255), reference(prediction, target, 19, 255))


@pytest.mark.parametrize("classes", [1, 2, 19, 79, 111, 230, 250])  # from 32 copies in shared memory to none
@pytest.mark.parametrize("pixels", [1, 7, 8, 9, 4111])
def test_class_counts_and_sizes(classes, pixels):
    prediction, target = labels((pixels,), classes), labels((pixels,), classes)
    assert torch.equal(kernel(prediction, target, classes, -100), reference(prediction, target, classes, -100))


@pytest.mark.parametrize("input_offset, target_offset", [(1, 0), (0, 3), (5, 5)])
def test_label_maps_that_are_not_aligned(input_offset, target_offset):
    prediction, target = labels((1000,), 19, torch.uint8), labels((1000,), 19)
    prediction, target = prediction[input_offset:][:900], target[target_offset:][:900]
    assert torch.equal(kernel(prediction, target, 19, -100), reference(prediction, target, 19, -100))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset", "sliced"])
@pytest.mark.parametrize("classes, size", [(3, (8, 24)), (19, (9, 13)), (33, (11, 12)), (90, (5, 16))])
def test_logits_in_every_layout(classes, size, layout, dtype):
    logits = torch.randint(-4, 5, (2, classes, *size)).to(dtype)  # many equal maxima
    logits[torch.rand(logits.shape) < 0.01] = float("nan")
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    elif layout == "offset":  # contiguous, but not on a 16-byte boundary
        logits = torch.cat([torch.zeros(1, dtype=dtype), logits.flatten()])[1:].view(logits.shape)
    elif layout == "sliced":
        logits = torch.cat([logits, logits], 3)[..., ::2]
    target = labels((2, *size), classes, ignored=-1)
    assert torch.equal(kernel(logits, target, classes, -1), reference(logits, target, classes, -1))


def test_more_tiles_than_blocks():
    """The grid is sized by the device, here two multiprocessors: blocks loop several times."""
    logits = torch.randn(1, 3, 130, 131).to(memory_format=torch.channels_last)
    target = labels((1, 130, 131), 3)
    assert torch.equal(kernel(logits, target, 3, -100), reference(logits, target, 3, -100))


@pytest.mark.parametrize("label", [-(2**63), -(2**31), -2, -1, 19, 2**31, 2**32 + 3, 2**63 - 1])
@pytest.mark.parametrize("where", ["target", "input"])
def test_labels_out_of_range_are_not_counted(label, where):
    pair = {"input": torch.zeros(100, dtype=torch.int64), "target": torch.zeros(100, dtype=torch.int64)}
    pair[where][57] = label
    result = kernel(pair["input"], pair["target"], 19, -100)
    assert result[0, 0] == 99 and result.sum() == 99


def test_empty():
    assert kernel(labels((0,), 2), labels((0,), 2), 2, -100).tolist() == [[0, 0], [0, 0]]
    assert kernel(torch.zeros(2, 3, 0, 4), labels((2, 0, 4), 3), 3, -100).sum() == 0
