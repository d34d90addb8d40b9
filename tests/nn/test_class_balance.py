"""Class-balanced cross-entropy against its formula, and median frequency weights against counts by hand."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.nn import ClassBalancedCrossEntropyLoss, median_frequency_weights
from fastseg.testing import assert_within_policy

CLASSES, IGNORE = 5, 255
WEIGHT = torch.tensor([0.25, 9.6, 1.0, 0.0, 3.0])


def scores_and_labels():
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(2, CLASSES, 9, 13, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 9, 13), generator=generator)
    labels[:, :2] = IGNORE
    return scores, labels


def formula(scores, labels, weight, reduction, pixel_weight=None):
    """As in Caffe: sum of weight[label] (-log p_label) over the number of pixels that are not ignored."""
    factor = torch.ones_like(scores[:, 0]) if pixel_weight is None else pixel_weight
    losses = F.cross_entropy(scores, labels, weight, ignore_index=IGNORE, reduction="none") * factor
    if reduction == "none":
        return losses
    return losses.sum() / factor[labels != IGNORE].sum() if reduction == "mean" else losses.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_formula(memory_format, reduction, weighted):
    scores, labels = scores_and_labels()
    pixel_weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    loss = ClassBalancedCrossEntropyLoss(WEIGHT, ignore_index=IGNORE, reduction=reduction)
    results = []
    for dtype, ours in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        input = scores.to(dtype, memory_format=memory_format, copy=True).requires_grad_()
        factor = None if pixel_weight is None else pixel_weight.to(dtype)
        if ours:
            value = loss(input, labels, factor)
        else:
            value = formula(input, labels, WEIGHT.to(dtype), reduction, factor)
        value.backward(torch.ones_like(value))
        results.append((value, input.grad))
    assert_within_policy(*[value for value, _ in results], "loss")
    assert_within_policy(*[gradient for _, gradient in results], "gradient")


def test_golden_value_divides_by_the_pixels_and_stock_by_the_weights():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    labels, weight = torch.tensor([0, 1]), torch.tensor([1.0, 3.0, 1.0])
    assert ClassBalancedCrossEntropyLoss(weight)(scores, labels).item() == pytest.approx(2.3152119, abs=1e-6)
    assert fastseg.nn.CrossEntropyLoss(weight)(scores, labels).item() == pytest.approx(1.1576060, abs=1e-6)


def test_without_weights_it_is_cross_entropy():
    scores, labels = scores_and_labels()
    loss = ClassBalancedCrossEntropyLoss(ignore_index=IGNORE)(scores, labels)
    assert_within_policy(
        loss,
        F.cross_entropy(scores, labels, ignore_index=IGNORE),
        F.cross_entropy(scores.double(), labels, ignore_index=IGNORE),
    )


def test_nothing_but_ignored_pixels():
    scores, labels = scores_and_labels()
    labels.fill_(IGNORE)
    assert ClassBalancedCrossEntropyLoss(WEIGHT, ignore_index=IGNORE)(scores, labels).isnan()
    zero = ClassBalancedCrossEntropyLoss(WEIGHT, ignore_index=IGNORE, zero_if_empty=True)
    assert zero(scores, labels) == 0


def test_state_moves_copies_and_pickles():
    scores, labels = scores_and_labels()
    loss = ClassBalancedCrossEntropyLoss(WEIGHT, ignore_index=IGNORE)
    assert list(loss.state_dict()) == ["weight"] and not list(loss.parameters())
    assert torch.equal(copy.deepcopy(loss)(scores, labels), loss(scores, labels))
    assert torch.equal(pickle.loads(pickle.dumps(loss))(scores, labels), loss(scores, labels))
    assert copy.deepcopy(loss).double().weight.dtype == torch.float64
    assert "ignore_index=255" in repr(loss)


def test_weights_of_counts_by_hand():
    first = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])  # 8 pixels: 6 of class 0, 2 of class 1
    second = torch.tensor([[0, 0, 2, IGNORE]])  # 3 labelled pixels: 2 of class 0, 1 of class 2
    # frequencies: class 0: 8 of 11, class 1: 2 of 8, class 2: 1 of 3, class 3: never; their median is 1/3
    expected = torch.tensor([11 / 24, 4 / 3, 1.0, 0.0])
    torch.testing.assert_close(median_frequency_weights([first, second], 4, IGNORE), expected)
    # without class 2 the median is the mean of 8/10 and 2/8
    expected = torch.tensor([0.525 / 0.8, 0.525 / 0.25])
    second = torch.tensor([0, 0], dtype=torch.uint8)
    torch.testing.assert_close(median_frequency_weights(iter([first, second]), 2), expected)


def test_one_tensor_is_a_sequence_of_images():
    labels = torch.randint(0, 3, (4, 5, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(median_frequency_weights(labels, 3), median_frequency_weights(list(labels), 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_label_dtypes(dtype):
    labels = torch.tensor([[[0, 1, 1, 1]]])
    expected = median_frequency_weights(labels, 2)
    assert torch.equal(median_frequency_weights(labels.to(dtype), 2), expected)


def test_ignored_label_does_not_wrap_around():
    labels = torch.tensor([[[0, 156, 156]]], dtype=torch.uint8)
    weights = median_frequency_weights(labels, 157, ignore_index=-100)
    assert weights[[0, 156]].tolist() == [pytest.approx(1.5), pytest.approx(0.75)]


@pytest.mark.parametrize(
    "label_maps, classes, error, message",
    [
        ([torch.tensor([[0, 3]])], 3, IndexError, r"label 3; allowed: \[0, 3\) and ignore_index=255"),
        ([torch.tensor([[0, -1]])], 3, IndexError, "label -1; allowed"),
        ([torch.zeros(2, 2)], 3, RuntimeError, "holds dtype float32; allowed: int64, int32"),
        ([[[0, 1]]], 3, TypeError, "holds list; allowed: tensors"),
        ([torch.full((2, 2), IGNORE)], 3, ValueError, "no labelled pixel"),
        ([], 3, ValueError, "no labelled pixel"),
        ([torch.zeros(2, 2, dtype=torch.uint8)], 0, ValueError, "num_classes is 0; allowed: 1 or more"),
    ],
)
def test_bad_label_maps_are_named(label_maps, classes, error, message):
    with pytest.raises(error, match=message):
        median_frequency_weights(label_maps, classes, IGNORE)
