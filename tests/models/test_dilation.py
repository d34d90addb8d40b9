"""The dilated front-end and the context module."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.models import ContextModule, DilationFrontEnd
from fastseg.models.blocks.mirroring import mirrored
from fastseg.models.dilation import DILATION7, DILATION8, DILATION10
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he
from tests.models.stock_dilation import CONTEXT, StockContext, StockDilation, enlarged, identity_initialised
from tests.models.stock_fcn import vgg16_in_torchvision_layout
from tests.models.verification import copied, randomised

WIDTH = 1 / 32


class MirroredStockDilation(StockDilation):
    """Of images that are smaller than the margin: numpy mirrors them again and again."""

    def coarse(self, image):
        height, width = image.shape[2:]
        places = np.pad(np.arange(height * width).reshape(height, width), self.margin, mode="reflect")
        return self.context(self.front_end(image.flatten(2)[..., torch.from_numpy(places)]))

    def forward(self, image):
        return enlarged(self.coarse(image), image.shape[2:])


def loss_at_every_eighth_pixel(stock, image, target):
    return F.cross_entropy(stock.coarse(image), target[:, ::8, ::8], ignore_index=255)


def keys_of_stock(model, stock):
    return {key: key.partition(".")[2] for key in stock.state_dict()}


def deviation(key, layer):
    """`test_context_starts_as_the_identity` checks the context module."""
    return None if key.startswith("ctx") else 0.001 if key.startswith("final") else he(layer)


def contract(padding, context, number, **facts):
    arguments = dict(padding=padding, context=context)

    def build(classes=CLASSES, width=WIDTH):
        return MirroredStockDilation(classes, width, dropout=0.0, **arguments)

    with torch.device("meta"):
        keys = list(keys_of_stock(None, build(21, 1.0)).values())
    return Contract(
        DilationFrontEnd, build, name=f"Dilation {padding} {context}",
        arguments=dict(width_multiplier=WIDTH, **arguments), keys_of_stock=keys_of_stock,
        stock_loss=loss_at_every_eighth_pixel, training=False, summed_alike=False, keys=keys,
        parameters=((arguments, number),), deviation=deviation, **facts,
    )  # fmt: skip


FRONT_END = 134_346_581
CONTRACTS = [
    contract("valid", None, FRONT_END, sizes=((24, 16), (21, 30))),
    contract("same", "basic", FRONT_END + 28_392, sizes=((64, 48), (45, 73))),
    contract(
        "same", "large", FRONT_END + 6_803_139, sizes=((45, 39),),
        bad_arguments=(
            (dict(padding="pad100"), "padding is 'pad100'; allowed: valid, same"),
            (dict(context="small"), "context is 'small'; allowed: None, basic, large"),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("size, scores", [(900 - 372, 66), (500 - 372, 16)])
def test_scores_without_padding(size, scores):
    with torch.device("meta"):
        assert DilationFrontEnd().coarse_scores(torch.empty(1, 3, size, size)).shape == (1, 21, scores, scores)


def test_sizes_of_a_900_pixel_tile():
    with torch.device("meta"):
        backbone = DilationFrontEnd().backbone
        pooled, (features,) = backbone(torch.empty(1, 3, 900, 900))
    assert [maps.shape[2] for maps in pooled] == [448, 222, 108, 102, 90]
    assert features.shape == (1, 4096, 66, 66)


@pytest.mark.parametrize("size", [(5, 7), (1, 3), (9, 1)])
def test_mirrored_as_numpy_does(size):
    image = torch.randn(2, 3, *size)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (4, 9), (17, 2)), mode="reflect")
    assert torch.equal(mirrored(image, (4, 9), (17, 2)), torch.from_numpy(expected))


def test_load_imagenet():
    source = vgg16_in_torchvision_layout(WIDTH).state_dict()
    model = DilationFrontEnd(width_multiplier=WIDTH)
    assert model.load_imagenet(source) is model
    own = model.state_dict()
    given = [value for key, value in source.items() if not key.startswith("classifier.6")]
    loaded = [value for key, value in own.items() if key.startswith(("conv", "fc"))]
    for ours, theirs in zip(loaded, given, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())


def scores_of(*size):
    return torch.randn(2, CLASSES, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind, number", [("basic", 28_392), ("large", 6_803_139)])
def test_number_of_parameters(kind, number):
    with torch.device("meta"):
        module, stock = ContextModule(kind=kind), StockContext(kind=kind)
    assert sum(value.numel() for value in module.parameters()) == number
    assert {key: value.shape for key, value in module.state_dict().items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }


@pytest.mark.parametrize(
    "kind, release, padding",
    [
        ("basic", "dilation7", "same"),
        ("basic", "dilation8", "first"),
        ("basic", "dilation10", "same"),
        ("large", "dilation8", "first"),
    ],
)
def test_context_equals_stock(kind, release, padding):
    dilations = {"dilation7": DILATION7, "dilation8": DILATION8, "dilation10": DILATION10}[release]
    module = randomised(ContextModule(CLASSES, kind=kind, dilations=dilations, padding=padding))
    stock = StockContext(CLASSES, kind, CONTEXT[release], padding)
    stock, exact = (copied(stock, module, lambda model, stock: {key: key for key in stock.state_dict()}) for _ in "ab")
    scores = scores_of(20, 19)
    output, expected = module(scores), stock(scores)
    assert output.shape == scores.shape
    assert_within_policy(output, expected, exact.double()(scores.double()), "scores")


@pytest.mark.parametrize("padding", ["same", "first"])
@pytest.mark.parametrize("kind", ["basic", "large"])
def test_context_starts_as_the_identity(kind, padding):
    module, scores = ContextModule(CLASSES, kind=kind, padding=padding, deviation=0.0), scores_of(12, 9)
    assert (scores < 0).any()
    torch.testing.assert_close(module(scores), scores.clamp(min=0), rtol=1e-6, atol=0)
    stock = identity_initialised(StockContext(CLASSES, kind), deviation=0.0)
    for key, value in stock.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.parametrize("kind", ["basic", "large"])
def test_noise_of_the_context_module(kind):
    torch.manual_seed(0)
    module = ContextModule(21, kind=kind)
    for name, layer in module.named_children():
        expected = 0.01 * 21 / layer.out_channels
        weight = layer.weight.detach()
        noise = weight[:, :, 0, 0] if layer.kernel_size == (3, 3) else weight[weight.abs() < 0.5]
        assert noise.std().item() == pytest.approx(expected, rel=0.2), name
        assert not layer.bias.any()


def test_context_module_learns_from_scores():
    """The second stage of the release's training."""
    module = ContextModule(CLASSES)
    scores, target = scores_of(12, 9), torch.randint(CLASSES, (2, 12, 9))
    target[0, 0] = 255
    loss = module.loss(scores, target)
    torch.testing.assert_close(loss, F.cross_entropy(module(scores), target, ignore_index=255))
    loss.backward()
    assert all(value.grad.abs().max() > 0 for value in module.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_classes=0), "num_classes is 0; allowed: 1 or more"),
        (dict(kind="small"), "kind is 'small'; allowed: basic, large"),
        (dict(padding="valid"), "padding is 'valid'; allowed: same, first"),
        (dict(dilations=(1, 2)), r"dilations is \(1, 2\); allowed"),
        (dict(kind="large", dilations=DILATION7), r"dilations is \(1, 1, 2, 4, 8, 1\); allowed"),
    ],
)
def test_bad_arguments_of_the_context_module_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"ContextModule: {message}"):
        ContextModule(**arguments)
    with pytest.raises(RuntimeError, match=r"ContextModule: image has shape \(1, 3, 8, 8\)"):
        ContextModule(5)(torch.zeros(1, 3, 8, 8))
