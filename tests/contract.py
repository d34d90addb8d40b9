"""Descriptions of public ops, in their test files, for tests/test_contract.py.

    CONTRACTS = [
        Contract(
            function=fastseg.ops.cross_entropy,
            stock=torch.nn.functional.cross_entropy,
            cases=[Case("plain", lambda make: dict(input=make.floating(2, 5, 7), target=make.labels(2, 7, classes=5)))],
        )
    ]

`function` and `stock` are called with the same keyword arguments. Tensors from `make.floating` are the leaves
whose gradients are compared; `make.constant` gives floating tensors without gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


class Make:
    """Builds the tensors of one call in one dtype, device and memory layout; every run gives the same ones."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", seed: int = 0):
        self.dtype, self.device, self.layout = dtype, device, layout
        self.generator = torch.Generator().manual_seed(seed)

    def floating(self, *shape: int, scale: float = 2.0, positive: bool = False) -> Tensor:
        """A leaf requiring grad, normal with deviation `scale`, in the layout under test; `positive`: its magnitude."""
        return self._laid_out(shape, scale, positive).detach().requires_grad_()

    def constant(self, *shape: int, low: float = 0.1, high: float = 2.0) -> Tensor:
        """Uniform in [low, high], contiguous, without gradient: class weights, pixel weights."""
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * uniform).to(self.device, self.dtype)

    def probabilities(self, *shape: int) -> Tensor:
        """Softmax over dim 1, without gradient: probability targets."""
        logits = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return logits.softmax(1 if len(shape) > 1 else 0).to(self.device, self.dtype)

    def labels(self, *shape: int, classes: int, ignored: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """Labels in [0, classes), about one in five of them `ignored` if given."""
        labels = torch.randint(classes, shape, generator=self.generator)
        if ignored is not None:
            labels[torch.rand(shape, generator=self.generator) < 0.2] = ignored
        return labels.to(self.device, dtype)

    def _laid_out(self, shape: Sequence[int], scale: float, positive: bool) -> Tensor:
        if self.layout == "expanded" and len(shape) > 1:
            return self._normal((1, *shape[1:]), scale, positive).expand(shape)
        if self.layout == "sliced" and len(shape) > 0:
            return self._normal((*shape[:-1], 2 * shape[-1] + 1), scale, positive)[..., 1::2][..., : shape[-1]]
        if self.layout == "channels_last" and len(shape) == 4:
            return self._normal(shape, scale, positive).to(memory_format=torch.channels_last)
        return self._normal(shape, scale, positive)

    def _normal(self, shape: Sequence[int], scale: float, positive: bool) -> Tensor:
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        values = values.abs() if positive else values
        return (values * scale).to(self.device, self.dtype)


@dataclass(frozen=True)
class Case:
    """One call. `small` cases (at most a few hundred numbers) also go through gradcheck."""

    name: str
    arguments: Callable[[Make], dict]
    small: bool = True


@dataclass(frozen=True)
class Contract:
    """A public op, the function that it must equal, and the calls to test.

    exact: outputs are integers that must equal stock's; nothing is differentiated.
    dtypes, rejected: of the floating arguments; rejected ones must raise an error that names the dtype.
    double_backward: the function replaced is twice differentiable.
    compile_whole: `torch.compile(fullgraph=True)` must work (False where the result's shape depends on data).
    """

    function: Callable
    stock: Callable
    cases: Sequence[Case]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    rejected: Sequence[torch.dtype] = (torch.int64, torch.complex64)
    layouts: Sequence[str] = LAYOUTS
    exact: bool = False
    double_backward: bool = True
    compile_whole: bool = True
    name: str = field(default="")

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.function.__name__)


def leaves(arguments: dict) -> dict[str, Tensor]:
    """The arguments whose gradients are compared."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}


def to_double(arguments: dict) -> dict:
    """The same call in fp64, with new leaves."""

    def convert(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return {name: convert(value) for name, value in arguments.items()}
