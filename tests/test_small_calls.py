"""Calls below the size thresholds, which "auto" leaves to stock PyTorch, keep all promises of the ops."""

import pytest
import torch

from fastseg import ops
from fastseg._op import REGISTRY
from tests.contract import Make
from tests.test_contract import CASES, _compare

WITH_STOCK = (
    ops.cross_entropy, ops.max_pool2d, ops.max_unpool2d, ops.upsample_bilinear2d, ops.dilated_conv2d,
    ops.conv_transpose2d,
)  # fmt: skip


@pytest.fixture(autouse=True)
def leave_to_stock(monkeypatch):
    """A function that sets the size below which calls go to stock: 0 for none, by default all."""

    def below(limit=1 << 62):
        for op in REGISTRY.values():
            for kind in op.stock.below if op.stock else ():
                monkeypatch.setitem(op.stock.below, kind, limit)

    below()
    return below


@pytest.mark.parametrize(
    "contract, case", [parameter for parameter in CASES if parameter.values[0].function in WITH_STOCK]
)
def test_contract(contract, case, device):
    for dtype in contract.dtypes:
        if not (device == "cuda" and dtype == torch.float64):
            _compare(contract, case, Make(dtype, device))
    _compare(contract, case, Make(torch.float32, device, "channels_last"))


def image(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


LABELS, PROBABILITIES = torch.arange(32).view(2, 4, 4) % 3, image(2, 3, 4, 4).softmax(1)
BAD = {
    "smoothing": (ops.cross_entropy, dict(target=LABELS, label_smoothing=-0.1)),
    "smoothing NaN": (ops.cross_entropy, dict(target=LABELS, label_smoothing=float("nan"))),
    "smoothing of probabilities": (ops.cross_entropy, dict(target=PROBABILITIES, label_smoothing=1.5)),
    "smoothing str": (ops.cross_entropy, dict(target=LABELS, label_smoothing="0.1")),
    "integer weights": (ops.cross_entropy, dict(target=LABELS, weight=torch.ones(3, dtype=torch.int64))),
    "integer weights with probabilities": (
        ops.cross_entropy, dict(target=PROBABILITIES, weight=torch.ones(3, dtype=torch.int64))),
    "double weights": (ops.cross_entropy, dict(target=LABELS, weight=torch.ones(3).double())),
    "four weights": (ops.cross_entropy, dict(target=PROBABILITIES, weight=torch.ones(4))),
    "weights that require grad": (ops.cross_entropy, dict(target=LABELS, weight=torch.ones(3, requires_grad=True))),
    "short labels": (ops.cross_entropy, dict(target=LABELS.short())),
    "shape of labels": (ops.cross_entropy, dict(target=LABELS[:, :3])),
    "batch of labels": (ops.cross_entropy, dict(target=LABELS[:1])),
    "reduction": (ops.cross_entropy, dict(target=LABELS, reduction="median")),
    "ignore_index": (ops.cross_entropy, dict(target=LABELS, ignore_index=255.0)),
    "ignore_index bool": (ops.cross_entropy, dict(target=LABELS, ignore_index=True)),
    "ignore_index of probabilities": (ops.cross_entropy, dict(target=PROBABILITIES, ignore_index=1)),
    "zero_if_empty": (ops.cross_entropy, dict(target=LABELS, zero_if_empty=1)),
    "kernel": (ops.max_pool2d, dict(kernel_size=0)),
    "stride": (ops.max_pool2d, dict(kernel_size=2, stride=0)),
    "padding": (ops.max_pool2d, dict(kernel_size=2, padding=2)),
    "dilation": (ops.max_pool2d, dict(kernel_size=2, dilation=0)),
    "window": (ops.max_pool2d, dict(kernel_size=9)),
    "ceil_mode": (ops.max_pool2d, dict(kernel_size=2, ceil_mode="floor")),
    "return_indices": (ops.max_pool2d, dict(kernel_size=2, return_indices=1)),
    "indices": (ops.max_unpool2d, dict(indices=torch.zeros(2, 3, 4, 4), kernel_size=2)),
    "shape of indices": (ops.max_unpool2d, dict(indices=torch.zeros(2, 3, 4, 1, dtype=torch.int64), kernel_size=2)),
    "output_size": (
        ops.max_unpool2d, dict(indices=torch.zeros(2, 3, 4, 4, dtype=torch.int64), kernel_size=2, output_size=(8, 99))),
    "size and scale": (ops.upsample_bilinear2d, dict(size=8, scale_factor=2)),
    "size of nothing": (ops.upsample_bilinear2d, dict(size=(0, 4))),
    "three sizes": (ops.upsample_bilinear2d, dict(size=(4, 4, 4))),
    "negative scale": (ops.upsample_bilinear2d, dict(scale_factor=-2.0)),
    "align_corners": (ops.upsample_bilinear2d, dict(size=8, align_corners=1)),
    "recomputed size": (ops.upsample_bilinear2d, dict(size=8, recompute_scale_factor=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike(name, leave_to_stock):
    function, arguments = BAD[name]
    errors = []
    for limit in (0, 1 << 62):
        leave_to_stock(limit)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            function(image(2, 3, 4, 4), **arguments)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][1].startswith(f"fastseg.ops.{function.__name__}: ")


@pytest.mark.parametrize("name", ["probabilities", "labels", "weights"])
def test_half_types_are_summed_in_float(name):
    """Sums above the range of fp16: stock gives inf and NaN."""
    if name == "probabilities":
        call = image(1, 2, 512, 512), image(1, 2, 512, 512).flip(3).softmax(1), None
    elif name == "labels":
        call = image(1, 2, 180, 180) * 7, torch.arange(180 * 180).view(1, 180, 180) % 2, None
    else:
        call = image(1, 2, 150, 150), torch.arange(150 * 150).view(1, 150, 150) % 2, torch.tensor([10.0, 300.0])
    half = [value.half() if value is not None and value.is_floating_point() else value for value in call]
    exact = [value.double() if value is not None and value.is_floating_point() else value for value in half]
    loss = ops.cross_entropy(*half)
    assert loss.dtype == torch.float16
    torch.testing.assert_close(loss.double(), torch.nn.functional.cross_entropy(*exact), rtol=1e-3, atol=0)
