"""DeepLab v3+ on Xception: parameters, keys, sizes, and variants against stock networks."""

import pytest
import torch
from torch import nn

from fastseg.models import DeepLabV3PlusXception
from fastseg.models.blocks.normalisation import FrozenBatchNorm2d
from fastseg.models.blocks.xception import Unit, Xception
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he, same_keys
from tests.models.stock_xception import StockDeepLabV3PlusXception, StockXception
from tests.models.verification import (
    assert_close_together,
    assert_vary,
    copied,
    outputs_and_gradients,
    randomised,
    stock_names,
)

WIDTH = 1 / 8  # 728 channels are 91
OF_TRUNCATED = 0.8796  # deviation of a standard normal distribution that is cut off at two deviations


def on_meta(build):
    with torch.device("meta"):
        return build()


def deviation(key, layer):
    """TensorFlow's for separable convolutions of the pyramid and the decoder."""
    if key == "decoder.classifier.weight":
        return 0.01
    if not key.startswith("backbone."):
        for kind, value in (("depthwise", 0.33), ("pointwise", 0.06)):
            if key.endswith(f".{kind}.weight"):
                return value * OF_TRUNCATED
    return he(layer)


CONTRACTS = [
    Contract(
        DeepLabV3PlusXception,
        lambda classes=CLASSES, width=WIDTH: StockDeepLabV3PlusXception(classes, width, 41, dropout=0.0),
        sizes=((64, 64), (35, 41)),
        arguments=dict(layers=41, width_multiplier=WIDTH),
        keys_of_stock=same_keys,
        summed_alike=False,
        parameters=(({}, 41_055_413), (dict(layers=71), 43_477_837)),
        keys=list(on_meta(lambda: StockDeepLabV3PlusXception(depth=41)).state_dict()),
        deviation=deviation,
        bad_arguments=(
            (dict(layers=50), "layers is 50; allowed: 41, 65, 71"),
            (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
            (dict(output_stride=32), "output_stride is 32; allowed: 8, 16"),
            (dict(multi_grid=(1, 2)), r"multi_grid is \(1, 2\); allowed: three integers, each 1 or more"),
        ),
    )
]


@pytest.mark.parametrize(
    "arguments, stock_arguments",
    (
        pytest.param({}, {}, id="65 layers"),
        pytest.param(dict(layers=71), dict(depth=71), id="71 layers"),
        pytest.param(
            dict(layers=41, output_stride=8, multi_grid=(1, 2, 4), norm="frozen"),
            dict(depth=41, output_stride=8, multi_grid=(1, 2, 4)),
            id="41 layers at stride 8",
        ),
    ),
)
def test_variants_equal_stock_networks(arguments, stock_arguments):
    """Scores, also on the way on which normalisation is folded into convolutions, and, in fp64, their gradients.

    In fp32 chance decides after 65 layers: which network has the largest error of all scores (so their norm is judged),
    the smaller error of one number, such as the loss of a contract, or the sign of a ReLU's input near 0.
    """
    model = randomised(DeepLabV3PlusXception(CLASSES, width_multiplier=WIDTH, dropout=0.0, **arguments)).eval()
    for unit in model.backbone.children():
        if isinstance(unit, Unit):
            unit.rep[-1].weight.data *= 0.3  # else the sums of 20 units grow to 10^9, and rounding with them
    stock, exact = (
        copied(StockDeepLabV3PlusXception(CLASSES, WIDTH, dropout=0.0, **stock_arguments), model, same_keys)
        for _ in range(2)
    )
    image = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    grad_output = torch.randn(2, CLASSES, 33, 41, generator=torch.Generator().manual_seed(2)).double()
    truth = outputs_and_gradients(exact.double(), image.double(), grad_output)
    assert_vary(truth)
    theirs, recorded = stock(image).detach(), model(image).detach()
    with torch.no_grad():
        folded = model(image)
    for scores in (recorded, folded):
        assert_close_together([(scores, theirs, truth[0].detach())], "scores")
    ours = outputs_and_gradients(model.double(), image.double(), grad_output)
    names = stock_names(model, ours[2], truth[2], same_keys(model, stock))
    for own, other in ((ours[1], truth[1]), *((ours[2][name], truth[2][other]) for name, other in names.items())):
        assert (own - other).abs().max() < 1e-8 * other.abs().max()


def test_output_stride_32():
    model, image = randomised(Xception(65, 3, WIDTH)).eval(), torch.randn(1, 3, 70, 64)
    results = []
    for dtype in (torch.float32, torch.float64):
        stock = StockXception(65, WIDTH, eps=1e-5).eval()
        stock.load_state_dict(model.state_dict())
        results.append(stock.to(dtype)(image.to(dtype)))
    low_level, last = model(image)
    assert low_level.shape[2:] == (18, 16) and last.shape[2:] == (3, 2)
    assert_within_policy(low_level, results[0][0], results[1][0], "low-level map")
    assert_within_policy(last, results[0][1], results[1][1], "last map")


@pytest.mark.parametrize("layers", (65, 71))
def test_sizes(layers):
    model = on_meta(lambda: DeepLabV3PlusXception(layers=layers)).eval()
    image = torch.empty(1, 3, 513, 513, device="meta")
    low_level, last = model.backbone(image)
    assert low_level.shape == (1, 256, 129, 129) and last.shape == (1, 2048, 33, 33)
    assert model.coarse_scores(image).shape == (1, 21, 129, 129)
    assert model(image).shape == (1, 21, 513, 513)


def test_parameters_of_parts():
    def count(module):
        return sum(value.numel() for value in module.parameters())

    model = on_meta(DeepLabV3PlusXception)
    assert (count(model.backbone), count(model.aspp), count(model.decoder)) == (37_867_312, 3_019_776, 168_325)
    assert count(on_meta(lambda: Xception(71))) == 40_289_736
    assert count(on_meta(lambda: Xception(41))) == 24_920_560


@pytest.mark.parametrize(
    "norm, kind", (("batch", nn.BatchNorm2d), ("sync", nn.SyncBatchNorm), ("frozen", FrozenBatchNorm2d))
)
def test_normalisation_is_of_one_kind(norm, kind):
    model = on_meta(lambda: DeepLabV3PlusXception(norm=norm))
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._NormBase)}
    assert {type(layer) for layer in norms.values()} == {kind}
    assert all(layer.eps == (1e-3 if path.startswith("backbone.") else 1e-5) for path, layer in norms.items())
