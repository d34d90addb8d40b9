"""Descriptions of networks, in their test files, for tests/models/test_contract.py.

    CONTRACTS = [
        Contract(
            network=SegNet, stock=lambda: StockSegNet(5, 1 / 16), sizes=((64, 96), (45, 23)),
            parameters=(({}, 29_449_355),), keys=("conv1_1.weight", ...),
        )
    ]

A network is built narrow, for `CLASSES` classes; `stock` builds the same network from torch.nn alone, without code of
fastseg.models, and gets its weights.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


def same_keys(model: nn.Module, stock: nn.Module) -> dict[str, str]:
    """{key of `stock`: key of `model`}; both have the release's keys."""
    return {key: key for key in stock.state_dict()}


def cross_entropy_of_scores(stock: nn.Module, image: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(stock(image), target, ignore_index=255)


def in_order(model: nn.Module, stock: nn.Module) -> dict[str, str]:
    """{key of `stock`: key of `model`}; both list their layers in the same order."""
    return dict(zip(stock.state_dict(), model.state_dict(), strict=True))


@dataclass(frozen=True, eq=False)
class Contract:
    """One network, or one of its variants.

    network: the class. arguments: for a small network, or for the variant.
    stock(classes, width): the independent network, without dropout if `training`; by default as narrow as `build`.
    keys_of_stock(model, stock): {key of `stock`: key of `model`}.
    sizes: image sizes for the comparison; the first are multiples of the stride, the others are not.
    stock_loss(stock, image, target): `Network.loss` of the independent network.
    training: True if running statistics and training are compared, too.
    summed_alike: False if layers sum in another order than the stock ones: the gradients of all parameters are then
        compared together, each relative to its largest value, since the rounding of a few numbers is random.
    deep: True if after so many ReLUs the largest rounding error of all gradients is random: gradients compared together
        are then judged by the norm of their errors, and with more room by the largest one.
    smallest: the least height and width that the network takes.
    parameters: (arguments, number) at full size. keys: those of a state dict at full size.
    uncounted: prefixes of keys that the published number does not count.
    deviation: of the initial weights of a layer, by its key; 0 for zeros, None to skip; by default He's.
    norm_shift: initial shift of the batch normalisations.
    bad_arguments: (arguments, error message) in addition to those of every network.
    """

    network: type[nn.Module]
    stock: Callable[..., nn.Module]
    sizes: tuple[tuple[int, int], ...]
    name: str = ""
    arguments: dict = field(default_factory=dict)
    keys_of_stock: Callable[[nn.Module, nn.Module], dict[str, str]] = in_order
    stock_loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy_of_scores
    training: bool = True
    summed_alike: bool = True
    deep: bool = True
    smallest: int = 1
    parameters: tuple[tuple[dict, int], ...] = ()
    keys: Collection[str] = ()
    uncounted: tuple[str, ...] = ()
    deviation: Callable[[str, nn.Module], float | None] = lambda key, layer: he(layer)
    norm_shift: float = 0.0
    bad_arguments: tuple[tuple[dict, str], ...] = ()

    def build(self, **changes) -> nn.Module:
        return self.network(**{"num_classes": CLASSES, **self.arguments, **changes})

    def has(self, argument: str) -> bool:
        return argument in inspect.signature(self.network).parameters

    def without_dropout(self) -> dict:
        return {"dropout": 0.0} if self.has("dropout") else {}

    def __str__(self) -> str:
        return self.name or self.network.__name__


def he_but_for_scores(*scores: str) -> Callable[[str, nn.Module], float]:
    """Score layers, by the beginnings of their keys, start with deviation 0.01, all others by He's rule."""
    return lambda key, layer: 0.01 if key.startswith(scores) else he(layer)


def he(layer: nn.Module) -> float:
    """Deviation of He's normal initialisation, fan in."""
    return (2 / layer.weight[0].numel()) ** 0.5
