"""Every network: parameters, keys, sizes, arguments, initialisation, and equality with an independent stock network."""

import copy
import importlib
import pickle
import pkgutil

import pytest
import torch
from torch import nn

import fastseg._op
import tests.models
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES
from tests.models.verification import (
    assert_close_results,
    assert_equal_networks,
    assert_vary,
    by_release_name,
    copied,
    loss_and_gradients,
    outputs_and_gradients,
    randomised,
    stock_names,
)

CONTRACTS = [
    contract
    for module in pkgutil.iter_modules(tests.models.__path__, "tests.models.")
    if module.name.startswith("tests.models.test_") and module.name != __name__
    for contract in getattr(importlib.import_module(module.name), "CONTRACTS", [])
]
CHANNELS_LAST = dict(memory_format=torch.channels_last)
every_network = pytest.mark.parametrize("contract", CONTRACTS, ids=str)


def image_of(contract, size, images=2):
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(1))


def equals_stock(contract, size, training, layout=None):
    """Output, every gradient and every running statistic within the policy."""
    model = randomised(contract.build(**contract.without_dropout())).train(training)
    image = image_of(contract, size)
    if layout is not None:
        model, image = model.to(**layout), image.to(**layout)
    stock, exact = (copied(contract.stock(), model, contract.keys_of_stock) for _ in range(2))
    stock = stock.to(**layout) if layout else stock
    keys = contract.keys_of_stock(model, stock)
    # The gradient of torch's max_unpool2d is never in channels_last, so its layers sum in another order.
    alike = contract.summed_alike and layout is None
    assert_equal_networks(model, stock, exact.double(), image, keys, alike, contract.deep)


@pytest.mark.parametrize(
    "contract, size, training",
    [
        pytest.param(contract, size, training, id=f"{contract}-{size[0]}x{size[1]}-{'train' if training else 'eval'}")
        for contract in CONTRACTS
        for size in contract.sizes
        for training in ((False, True)[: 1 + contract.training])
    ],
)
def test_equals_a_stock_network_forward_and_backward(contract, size, training):
    equals_stock(contract, size, training)


@every_network
def test_loss_and_its_gradients_equal_those_of_a_stock_network(contract):
    model = randomised(contract.build(**contract.without_dropout())).train(contract.training)
    image = image_of(contract, contract.sizes[0])
    target = torch.randint(CLASSES, (2, *contract.sizes[0]), generator=torch.Generator().manual_seed(3))
    target[:, 1, 2:9] = 255
    stock, exact = (copied(contract.stock(), model, contract.keys_of_stock) for _ in range(2))
    exact.double()
    ours = loss_and_gradients(model, lambda image: model.loss(image, target), image)
    theirs = loss_and_gradients(stock, lambda image: contract.stock_loss(stock, image, target), image)
    truth = loss_and_gradients(exact, lambda image: contract.stock_loss(exact, image, target), image.double())
    names = stock_names(model, ours[2], theirs[2], contract.keys_of_stock(model, stock))
    assert_close_results(ours, theirs, truth, names, alike=False, deep=True)


@every_network
def test_labels_of_another_size_are_refused(contract):
    model, (height, width) = contract.build(), contract.sizes[0]
    for shape in ((2, height, width - 1), (2, height + 1, width), (1, height, width), (2, 1, height, width)):
        with pytest.raises((RuntimeError, ValueError), match="target"):
            model.loss(image_of(contract, (height, width)), torch.zeros(shape, dtype=torch.long))


@every_network
def test_predicts_the_labels_of_the_highest_scores(contract):
    model, image = randomised(contract.build()).eval(), image_of(contract, contract.sizes[-1])
    labels, scores = model.predict(image), model(image).detach()
    assert labels.shape == (2, *contract.sizes[-1]) and labels.dtype == torch.uint8
    highest, second = scores.topk(2, dim=1).values.unbind(1)
    clear = highest - second > 1e-4 * highest.abs()
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear].long(), scores.argmax(1)[clear])


@every_network
def test_equals_a_stock_network_in_channels_last(contract):
    equals_stock(contract, contract.sizes[-1], False, CHANNELS_LAST)
    model, image = contract.build().eval().to(**CHANNELS_LAST), image_of(contract, contract.sizes[-1])
    assert model(image.to(**CHANNELS_LAST)).stride(1) == 1


@every_network
def test_equals_its_reference_backend(contract, monkeypatch):
    """Outputs and gradients of our kernels and of their references in PyTorch."""
    model = randomised(contract.build()).eval()
    image, results = image_of(contract, contract.sizes[-1]), []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        with monkeypatch.context() as patch:
            patch.setattr(fastseg._op, "AUTO", backend)
            gradient = torch.randn(2, CLASSES, *image.shape[2:], generator=torch.Generator().manual_seed(2))
            network = copy.deepcopy(model).to(dtype)
            results.append(outputs_and_gradients(network, image.to(dtype), gradient.to(dtype)))
    assert_vary(results[2])
    assert_close_results(*results, {name: name for name in results[0][2]}, alike=False, deep=contract.deep)


@every_network
def test_number_of_parameters_and_keys(contract):
    assert contract.parameters and contract.keys
    for arguments, number in contract.parameters:
        with torch.device("meta"):
            parameters = contract.network(**arguments).state_dict(keep_vars=True)
        counted = [
            value.numel()
            for key, value in parameters.items()
            if isinstance(value, nn.Parameter) and not key.startswith(contract.uncounted)
        ]
        assert sum(counted) == number, arguments
    with torch.device("meta"):
        keys = list(contract.build(num_classes=21, width_multiplier=1).state_dict())
    assert sorted(keys) == sorted(contract.keys)


@every_network
def test_every_size_comes_back_as_it_went_in(contract):
    model = contract.build(in_channels=1).eval()
    with torch.no_grad():
        for height in range(contract.smallest, contract.smallest + 66, 5):  # every remainder class of a stride of 4
            width = contract.smallest + 7 * height % 131
            assert model(torch.zeros(1, 1, height, width)).shape == (1, CLASSES, height, width)


@every_network
def test_initialisation(contract):
    torch.manual_seed(0)
    model = contract.build(**({"width_multiplier": 0.25} if "width_multiplier" in contract.arguments else {}))
    names = by_release_name(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all() and layer.bias.eq(contract.norm_shift).all(), path
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            expected = contract.deviation(names(f"{path}.weight"), layer)
            if expected is not None:
                deviation = layer.weight.detach().square().mean().sqrt().item()
                assert deviation == pytest.approx(expected, rel=0.2), path
            assert layer.bias is None or layer.bias.count_nonzero() == 0, path


@every_network
def test_copies_pickles_and_loads(contract):
    model = randomised(contract.build()).eval()
    image = image_of(contract, contract.sizes[-1], images=1)
    expected = model(image)
    loaded = contract.build().eval()
    loaded.load_state_dict(model.state_dict())
    part = nn.Sequential(contract.build()).eval()  # part of a larger network: its keys have a prefix
    part.load_state_dict({f"0.{key}": value for key, value in model.state_dict().items()})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, part):
        assert torch.equal(other(image), expected)
    first, *others = model.state_dict()
    with pytest.raises(RuntimeError, match=f'Missing key.*"{first}"'):
        loaded.load_state_dict({key: model.state_dict()[key] for key in others})


@every_network
def test_traces_into_one_graph(contract):
    torch.compiler.reset()  # it traces one function, such as a `forward` that networks share, only a few times
    model = randomised(contract.build()).eval()
    image = image_of(contract, contract.sizes[-1], images=1)
    traced, exact = torch.compile(model, backend="eager", fullgraph=True), copy.deepcopy(model).double()
    with torch.no_grad():
        assert_within_policy(traced(image), model(image), exact(image.double()), "output")


@every_network
def test_dropout_only_while_training(contract):
    model = randomised(contract.build(**({"dropout": 0.5} if contract.has("dropout") else {}))).eval()
    image = image_of(contract, contract.sizes[-1])
    assert torch.equal(model(image), model(image))
    drops = [layer.train() for layer in model.modules() if isinstance(layer, (nn.Dropout, nn.Dropout2d))]
    assert bool(drops) == contract.has("dropout")
    assert not drops or not torch.equal(model(image), model(image))


@every_network
def test_bad_arguments_are_named(contract):
    bad = [
        (dict(num_classes=0), "num_classes is 0; allowed: 1 or more"),
        (dict(in_channels=0), "in_channels is 0; allowed: 1 or more"),
    ]
    if contract.has("width_multiplier"):
        bad.append((dict(width_multiplier=0), "width_multiplier is 0; allowed: above 0"))
    if contract.has("dropout"):
        bad += [(dict(dropout=1.5), "dropout"), (dict(dropout=-0.5), "dropout")]
    for arguments, message in (*bad, *contract.bad_arguments):
        with pytest.raises(ValueError, match=message):
            contract.build(**arguments)


@every_network
def test_bad_images_are_named(contract):
    model, least = contract.build(), contract.smallest
    message = rf"{contract.network.__name__}: image has shape .*; allowed: \(N, 3, H, W\) with H and W at least {least}"
    for shape in ((3, 224, 224), (1, 4, 224, 224), (1, 3, least - 1, 224), (1, 3, 224, least - 1), (1, 3, 224)):
        with pytest.raises(RuntimeError, match=message):
            model(torch.zeros(shape))
