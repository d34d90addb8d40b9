"""cross_entropy: invalid labels, labels compared in all their bits, labels of two classes."""

import pytest
import torch
import torch.nn.functional as F

from fastseg.ops import cross_entropy
from fastseg.testing import assert_within_policy
from tests.ops.test_cross_entropy import DTYPES, both


@pytest.mark.sanitized
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, 3, 255, 2**31, 2**32 + 1, 2**40, -(2**63)])
@pytest.mark.parametrize("pixel", [5, 69])  # one of sixteen that are checked together, one of the last few
@pytest.mark.parametrize("classes", [3, 2])
def test_labels_out_of_range_raise_as_stock(classes, pixel, label, smoothing, grad):
    input, target = torch.randn(2, classes, 70, requires_grad=grad), torch.zeros(2, 70, dtype=torch.int64)
    target[1, pixel] = label
    for function in (cross_entropy, F.cross_entropy):
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
            function(input, target, label_smoothing=smoothing)


@pytest.mark.parametrize("classes", [3, 2])
@pytest.mark.parametrize("ignore_index", [-(2**63), -(2**32), 2**31, 2**32 + 1, 2**40])
def test_labels_are_compared_in_all_their_bits(ignore_index, classes):
    input, target = torch.randn(2, classes, 70), torch.randint(classes, (2, 70))
    target[:, ::3] = ignore_index
    for options in (dict(), dict(label_smoothing=0.2)):
        ours, stock = both(input, target, ignore_index=ignore_index, **options)
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ignore_index", [255, 0, 1])
@pytest.mark.parametrize("labels", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_classes_on_every_thread_as_stock(dtype, labels, ignore_index, channels_last, reduction):
    """Images that end within a tile, more tiles than one thread takes."""
    input = torch.randn(3, 2, 113, 127, dtype=torch.float64).mul(4).to(dtype)
    input = input.to(memory_format=torch.channels_last) if channels_last else input
    target = torch.randint(2, (3, 113, 127))
    target[torch.rand(target.shape) < 0.2] = ignore_index
    results = []
    for function, kind in ((cross_entropy, dtype), (F.cross_entropy, dtype), (F.cross_entropy, torch.float64)):
        leaf = input.to(kind).detach().requires_grad_()
        given = target.to(labels) if function is cross_entropy else target
        loss = function(leaf, given, ignore_index=ignore_index, reduction=reduction)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    for ours, stock, exact in zip(*results):
        assert_within_policy(ours, stock, exact)
