"""The rows of an op's table: `Backend` and `Stock`, and how their functions get values by name (`Named`).

What an `Op` does with them: fastseg/_op.py.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Protocol

import torch

from fastseg import _library
from fastseg import _private_api as private
from fastseg._dtypes import FLOATING, FLOATING_GPU

BACKEND_NAMES = ("stock", "cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """No backend can run this call; the message gives each backend's reason."""


def parse(schema: str) -> tuple[str, list[str], list[str], list[str]]:
    """Name, argument names, those of tensors, and output names of `name(Tensor a, int b) -> (Tensor c, Tensor d)`."""
    name, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> \(?(.*?)\)?", schema).groups()
    typed = [part.split() for part in arguments.split(", ")]
    tensors = [argument for kind, argument in typed if kind in ("Tensor", "Tensor?")]
    return name, [argument for _, argument in typed], tensors, [part.split()[-1] for part in returns.split(", ")]


def picker(positions: Sequence[int]) -> Callable[[tuple], tuple]:
    """A function of a tuple that gives the values at these positions, always as a tuple."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0, 0))


def native_schema(schema: str) -> str:
    """The schema of the C++ entry point: `_<name>(arguments, outputs to fill) -> ()`."""
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    outputs = [part.split()[-1] for part in returns.strip("()").split(", ")]
    filled = [f"Tensor({letter}!) {output}" for letter, output in zip("abcdefgh", outputs)]
    return f"_{name}({', '.join([arguments.replace('SymInt', 'int'), *filled])}) -> ()"


class Named:
    """A function of some of an op's values, which it asks for by the names of its parameters."""

    __slots__ = ("function", "pick", "positions")

    def __init__(self, function: Callable, names: Sequence[str], what: str):
        wanted = list(inspect.signature(function).parameters)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise TypeError(f"{what} asks for {', '.join(unknown)}; there are {', '.join(names)}")
        self.positions = [names.index(name) for name in wanted]
        self.pick = picker(self.positions)
        self.function = function

    def __call__(self, values: tuple):
        return self.function(*[values[position] for position in self.positions])  # as torch.compile can trace it


class Bound(Protocol):
    """What a row needs to know of the op whose table it stands in."""

    name: str
    native_name: str
    arguments: list[str]
    results: list[str]


class Backend:
    """One way to run an op, and the conditions under which it may: the predicate that decides is the one that explains.

    name: "cpu", "cuda", "triton" or "reference".
    run: "cpu" and "cuda" take none: they are the C++ entry point `fastseg::_<op>`, which takes the arguments and then
        the outputs to fill, as every kernel does. A "cpu" that is put together from PyTorch's ops instead is a plain
        function of the arguments that returns the outputs. "triton": where its launcher stands, "<module>.<function>"
        below fastseg.kernels, imported when it is first called; it fills the outputs among its parameters.
        "reference": a plain function of the arguments that returns the outputs.
    dtypes: allowed dtypes of the op's first argument; None for any.
    refuses: gives the reason why this call cannot run here, or None.
    """

    def __init__(
        self,
        name: str,
        run: Callable | str | None = None,
        *,
        dtypes: Sequence[torch.dtype] | None = None,
        refuses: Callable[..., str | None] | None = None,
    ):
        self.name, self.dtypes = name, dtypes
        self._run, self._refuses = run, refuses
        self._available = False  # found so, which is not asked again

    def is_native(self) -> bool:
        """True if it is a C++ entry point."""
        return self.name in ("cpu", "cuda") and self._run is None

    def bind(self, op: "Bound") -> None:
        """Resolves names and the C++ entry point for the op whose table this stands in."""
        self._native = op.native_name if self.is_native() else None
        self._values = (*op.arguments, *op.results)
        self._where = f"{op.name}, backend {self.name}"
        refuses = self._refuses
        self.refuses = None if refuses is None else Named(refuses, op.arguments, f"{self._where}: refuses")
        self.function = None  # for what returns the outputs rather than filling them
        if callable(self._run):
            self.function = Named(self._run, op.arguments, self._where)
        elif self._native is not None:
            self.kernel = private.boxed_call_of(self._native)
        else:
            self.kernel = self._load

    def _load(self, *values) -> None:
        """The first call of a Triton kernel imports its module, and triton with it."""
        module, _, function = self._run.rpartition(".")
        launcher = getattr(importlib.import_module(f"fastseg.kernels.{module}"), function)
        named = Named(launcher, self._values, self._where)
        pick = named.pick
        self.kernel = lambda *values: launcher(*pick(values))
        self.kernel(*values)

    def why_not(self, args: tuple) -> str | None:
        """None if this backend can run the call, else the reason."""
        lead = args[0]
        # The device first: asking for a GPU initialises CUDA, which a process that uses none (and forks) must not do.
        device = lead.device.type
        if self.name == "cpu" or (self.name == "triton" and _library.interpreting()):
            fits = device == "cpu"
        else:
            fits = device == "cuda" or self.name == "reference"
        if not fits:
            wanted = "cpu" if self.name == "cpu" or _library.interpreting() else "cuda"
            return f"tensors are on {lead.device}; it runs on {wanted}"
        if not self._available:
            reason = self.missing()
            if reason is not None:
                return reason
        if self.dtypes is not None and lead.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"dtype {str(lead.dtype).removeprefix('torch.')}; supported: {names}"
        refuses = self.refuses
        return None if refuses is None else refuses.function(*refuses.pick(args))

    def missing(self) -> str | None:
        """None if this backend's code is there and this machine can run it, else the reason."""
        reason = None if self.function else _library.missing(self.name)
        if reason is None and self._native is not None:
            key = "CUDA" if self.name == "cuda" else "CPU"
            if not private.has_kernel(self._native, key):
                reason = (
                    f"the loaded library does not implement {self._native} for {key}: rebuild it "
                    f"({_library.HOW_TO_BUILD})"
                )
        self._available = reason is None
        return reason


class Stock:
    """PyTorch's own function as a backend: "auto" takes it for small CPU tensors, where one call into C++ ends sooner.

    run: a plain function of the arguments, differentiated by PyTorch; returns what the op returns, of several outputs
        those that the public function uses. What it raises reaches the user.
    below: by class of calls, the number of elements of the first argument below which "auto" takes it.
    which: names the class of a call, a key of `below`, or None where it is never faster; by default the only key.
    refuses: gives the reason why stock does not keep every promise of the op on this call, or None.
    on_gpu: True if "auto" takes it for this call on a GPU; by default never.
    """

    name, dtypes = "stock", None

    def __init__(
        self,
        run: Callable,
        *,
        below: Mapping[str, int],
        which: Callable[..., str | None] | None = None,
        refuses: Callable[..., str | None] | None = None,
        on_gpu: Callable[..., bool] | None = None,
    ):
        self._run, self.below, self._which, self._refuses = run, dict(below), which, refuses
        self._on_gpu = on_gpu

    def bind(self, op: "Bound") -> None:
        self._only = None if self._which else next(iter(self.below))
        self.function = Named(self._run, op.arguments, f"{op.name}, stock")
        self.which = None if self._which is None else Named(self._which, op.arguments, f"{op.name}, stock: which")
        self.refuses = Named(self._refuses or (lambda: None), op.arguments, f"{op.name}, stock: refuses")
        self.on_gpu = Named(self._on_gpu or (lambda: False), op.arguments, f"{op.name}, stock: on_gpu")

    def why_not(self, args: tuple) -> str | None:
        return self.refuses(args)

    def missing(self) -> None:
        return None

    def is_faster(self, args: tuple) -> bool:
        """True if "auto" leaves this call to stock PyTorch.

        Never in a traced program, where the answer would become a condition on the sizes that it takes.
        """
        lead, which, refuses = args[0], self.which, self.refuses
        elements = lead.numel()
        if type(elements) is not int:
            return False
        if not lead.is_cpu:
            return lead.is_cuda and self.on_gpu(args) and self.refuses(args) is None
        kind = self._only if which is None else which.function(*which.pick(args))
        if kind is None or elements >= self.below[kind]:
            return False
        return refuses.function(*refuses.pick(args)) is None


def rows(
    reference: Callable,
    *,
    stock: Stock | None = None,
    cpu: Sequence[torch.dtype] | None = FLOATING,
    cuda: Sequence[torch.dtype] | None = None,
    triton: str | None = None,
    refuses_triton: Callable[..., str | None] | None = None,
) -> list[Backend | Stock]:
    """The usual table: stock for small calls, a C++ kernel for the dtypes `cpu`, one GPU kernel, the reference.

    cuda: the dtypes of a CUDA kernel; triton: where a Triton launcher stands, for fp32 and half types.
    """
    table: list[Backend | Stock] = [stock] if stock else []
    table.append(Backend("cpu", dtypes=cpu))
    if cuda is not None:
        table.append(Backend("cuda", dtypes=cuda))
    if triton is not None:
        table.append(Backend("triton", triton, dtypes=FLOATING_GPU if cpu else None, refuses=refuses_triton))
    return [*table, Backend("reference", reference)]
