"""Networks: a training step and a prediction of ours against the independent torch.nn networks of tests/models.

On the CPU a quarter as wide as published, on a GPU as published, with ResNets of 50 layers. Eager steps are compared
with eager stock; compiled predictions, and compiled training of the networks that end in a fused loss, with
`torch.compile` of stock, which take a minute each to compile.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import tests.models
from benchmarks import checks, inputs
from benchmarks.harness import MEMORY_FORMATS, Case, Peer, Shape, Target, specialised
from fastseg.models.coarse import CoarseNetwork, SubsampledNetwork
from fastseg.models.unet import UNetSame
from fastseg.testing import assert_within_policy
from tests.models.contract import Contract

CLASSES = 21  # of PASCAL VOC
MORE_CLASSES = {"PSPNet": 150}  # of ADE20K, which it was published for
WIDTH = 1 / 4
LARGER_WIDTH = {"UNetAarhus": 1}  # published with 16 channels
IMAGES, QUICK_IMAGES = 4, 2  # quick cases, known by their number of images, take the contracts' narrow networks
SIDE = 129  # 8k + 1 and 16k + 1 pixels fit the networks with aligned corners
LARGER_SIDE = {"DeconvNet": 225}  # it takes no smaller image
FULL_SIDE = 513  # on a GPU
NEVER_SLOWER = (Target("speedup", 0.95),)  # two steps of the same speed differ by a few percent here
FUSED_LOSS = (Target("speedup", 1.3), Target("memory_ratio", 1.5))  # one of the two is asked for, both are told


def first_contracts() -> list[Contract]:
    """Of each network, in the order of their files."""
    found: dict[type, Contract] = {}
    for module in pkgutil.iter_modules(tests.models.__path__, "tests.models."):
        if module.name.startswith("tests.models.test_") and module.name != "tests.models.test_contract":
            for contract in getattr(importlib.import_module(module.name), "CONTRACTS", []):
                found.setdefault(contract.network, contract)
    return list(found.values())


def classes_of(contract: Contract) -> int:
    return MORE_CLASSES.get(contract.network.__name__, CLASSES)


def width_of(contract: Contract, shape: Shape) -> float:
    """The width multiplier for images of that shape."""
    if shape[0] == QUICK_IMAGES:
        return contract.arguments["width_multiplier"]
    return 1 if shape[-1] == FULL_SIDE else LARGER_WIDTH.get(contract.network.__name__, WIDTH)


def ends_in_fused_loss(contract: Contract) -> bool:
    """True if the loss interpolates the scores itself, or sums cross entropy and Dice in one pass."""
    coarse = issubclass(contract.network, CoarseNetwork) and not issubclass(contract.network, SubsampledNetwork)
    return coarse or issubclass(contract.network, UNetSame)


@torch.compiler.disable  # what is compiled is a step of a network that exists
def networks(contract: Contract, image: Tensor) -> tuple[nn.Module, nn.Module]:
    """Ours and the independent one for such images, with the same weights."""
    return _networks(contract, width_of(contract, image.shape), image.device, image.dtype)


@functools.cache
def _networks(contract: Contract, width: float, device: torch.device, dtype: torch.dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = contract.build(num_classes=classes_of(contract), width_multiplier=width, **contract.without_dropout())
        stock = contract.stock(classes_of(contract), width)
    values = ours.state_dict()
    stock.load_state_dict({key: values[own] for key, own in contract.keys_of_stock(ours, stock).items()})
    return ours.to(device, dtype), stock.to(device, dtype)


def training_steps(contract: Contract) -> tuple[Callable, Callable]:
    """The loss in training, of which the benchmark computes every gradient."""

    def run_ours(image: Tensor, target: Tensor) -> Tensor:
        network, _ = networks(contract, image)
        return network.train().loss(image, target)

    def run_stock(image: Tensor, target: Tensor) -> Tensor:
        _, network = networks(contract, image)
        return contract.stock_loss(network.train(), image, target)

    return run_ours, run_stock


def predictions(contract: Contract) -> tuple[Callable, Callable, Callable]:
    """Labels by ours and by stock, and the scores of stock."""

    def run_ours(image: Tensor) -> Tensor:
        network, _ = networks(contract, image)
        return network.eval().predict(image)

    def scores(image: Tensor) -> Tensor:
        _, network = networks(contract, image)
        return network.eval()(image)

    return run_ours, lambda image: scores(image).argmax(1), scores


def loss_and_gradient_norm(stock: Callable, compiled: bool = False) -> Callable:
    """A check of the loss, and of the image's gradient by its norm: a rounding before a ReLU changes elements.

    compiled: whether to compare with the rounding of the compiled network, whose normalisations sum otherwise.
    """
    program = specialised(stock) if compiled else stock

    def verify(case: Case, arguments) -> str | None:
        ours = checks.value_and_gradient(case.ours, arguments)
        theirs = checks.value_and_gradient(program, arguments)
        exact = checks.value_and_gradient(stock, checks.in_double(arguments))
        try:
            assert_within_policy(ours[0], theirs[0], exact[0], "loss")
        except AssertionError as error:
            return str(error)
        error, error_of_stock = ((one[1] - exact[1]).norm().item() for one in (ours, theirs))
        if not error <= 2 * error_of_stock:
            return f"gradient: error {error:.2e}, that of stock {error_of_stock:.2e}"
        return None

    return verify


def images(shape, device, dtype, layout) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])


def images_and_labels(contract: Contract) -> Callable:
    def make(shape, device, dtype, layout) -> tuple[Tensor, Tensor]:
        labels = inputs.labels((shape[0], *shape[2:]), classes_of(contract), device)
        return images(shape, device, dtype, layout), labels

    return make


def minimal_bytes(contract: Contract, copies: int) -> Callable:
    """Of any implementation: image and weights, `copies` times: read, and in training their gradients written."""

    def count(shape, dtype) -> int:
        with torch.device("meta"):
            weights = contract.build(
                num_classes=classes_of(contract), width_multiplier=width_of(contract, shape)
            ).parameters()
        elements = sum(weight.numel() for weight in weights) + torch.empty(shape, device="meta").numel()
        return copies * dtype.itemsize * elements

    return count


def cases_of(contract: Contract) -> list[Case]:
    side = LARGER_SIDE.get(contract.network.__name__, SIDE)
    shape = (IMAGES, 3, side, side)
    loss, stock_loss = training_steps(contract)
    labels, stock_labels, scores = predictions(contract)
    quick = (QUICK_IMAGES, 3, *(2 * (side if side > SIDE else 33,)))
    training = Case(
        "networks", shape, images_and_labels(contract), loss, eager(stock_loss), minimal_bytes(contract, 2),
        loss_and_gradient_norm(stock_loss), name=f"{contract.network.__name__} training", layout="channels_last",
        targets=FUSED_LOSS if ends_in_fused_loss(contract) else NEVER_SLOWER, allocators=("tuned",), quick_shape=quick,
        devices=("cpu",),
    )  # fmt: skip
    prediction = replace(
        training, make=lambda *arguments: (images(*arguments),), ours=labels, peers=eager(stock_labels),
        minimal_bytes=minimal_bytes(contract, 1), verify=checks.labels_of_maximum(scores),
        name=f"{contract.network.__name__} prediction", backward=False, targets=NEVER_SLOWER,
    )  # fmt: skip
    narrow = [training, prediction, as_compiled(prediction, stock_labels)]
    if ends_in_fused_loss(contract):
        step = as_compiled(training, stock_loss)
        narrow.append(replace(step, verify=loss_and_gradient_norm(stock_loss, compiled=True)))
    full = (IMAGES, 3, FULL_SIDE, FULL_SIDE)
    return [*narrow, *(replace(case, shape=full, devices=("cuda",), targets=()) for case in narrow)]


def eager(stock: Callable) -> dict[str, Peer]:
    return {"eager": Peer(stock, "contiguous"), "eager channels_last": Peer(stock, "channels_last")}


def as_compiled(case: Case, stock: Callable) -> Case:
    peers = {"compile channels_last": Peer(stock, "channels_last", compiled=True)}
    return replace(case, name=f"{case.name} compiled", peers=peers, compiled=True, targets=NEVER_SLOWER)


CASES = [case for contract in first_contracts() for case in cases_of(contract)]
