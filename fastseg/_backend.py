"""The rows of an op's table, `Backend` and `Stock`; `Named` passes values to their functions by parameter name.

`Op` (fastseg/_op.py) uses them.
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

ALWAYS = 1 << 62  # a limit of `Stock.below`: at any size
BACKEND_NAMES = ("stock", "cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """No backend can run this call; the message gives each backend's reason."""


def parse(schema: str) -> tuple[str, list[str], list[str], list[str]]:
    """Splits `name(Tensor a, int b) -> (Tensor c, Tensor d)`: name, arguments, tensor arguments and outputs."""
    name, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> \(?(.*?)\)?", schema).groups()
    typed = [part.split() for part in arguments.split(", ")]
    tensors = [argument for kind, argument in typed if kind in ("Tensor", "Tensor?")]
    return name, [argument for _, argument in typed], tensors, [part.split()[-1] for part in returns.split(", ")]


def picker(positions: Sequence[int]) -> Callable[[tuple], tuple]:
    """A function that takes a tuple and returns the tuple of the values at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0, 0))


def native_schema(schema: str) -> str:
    """The schema of the C++ entry point: `_<name>(arguments, outputs to fill) -> ()`."""
    name, _, signature = schema.partition("(")
    arguments, _, returns = signature.rpartition(") -> ")
    outputs = [part.split()[-1] for part in returns.strip("()").split(", ")]
    filled = [f"Tensor({letter}!) {output}" for letter, output in zip("abcdefgh", outputs)]
    return f"_{name}({', '.join([arguments.replace('SymInt', 'int'), *filled])}) -> ()"


class Named:
    """A function of some of an op's values: the names of its parameters say which."""

    __slots__ = ("function", "pick", "positions")

    def __init__(self, function: Callable, names: Sequence[str], what: str):
        wanted = list(inspect.signature(function).parameters)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise TypeError(f"{what} has parameters {', '.join(unknown)}; allowed: {', '.join(names)}")
        self.positions = [names.index(name) for name in wanted]
        self.pick = picker(self.positions)
        self.function = function

    def __call__(self, values: tuple):
        return self.function(*[values[position] for position in self.positions])  # torch.compile can trace this


class Bound(Protocol):
    """What a row of the table reads from its op."""

    name: str
    native_name: str
    arguments: list[str]
    results: list[str]


class Backend:
    """One way to run an op, and the conditions under which it can (`why_not`, which also gives the explanation).

    name: "cpu", "cuda", "triton" or "reference".
    run: None for "cpu" and "cuda" in C++: the entry point `fastseg::_<op>` takes the arguments, then the outputs to
        fill, as every kernel does. For a "cpu" made of PyTorch's ops: a function that takes the arguments and returns
        the outputs. For "triton": the path of the launcher, "<module>.<function>" below fastseg.kernels, imported at
        the first call; it fills the outputs among its parameters. For "reference": a function that takes the arguments
        and returns the outputs.
    dtypes: allowed dtypes of the op's first argument; None for any.
    refuses: returns the reason why this backend cannot run a call, or None.
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
        self._available = False  # True once `missing` has found nothing: it is then not called again

    def is_native(self) -> bool:
        """True if it is a C++ entry point."""
        return self.name in ("cpu", "cuda") and self._run is None

    def bind(self, op: "Bound") -> None:
        """Resolves names and the C++ entry point for the op that has this row."""
        self._native = op.native_name if self.is_native() else None
        self._values = (*op.arguments, *op.results)
        self._where = f"{op.name}, backend {self.name}"
        refuses = self._refuses
        self.refuses = None if refuses is None else Named(refuses, op.arguments, f"{self._where}: refuses")
        self.function = None  # set if it returns the outputs; a `kernel` fills them
        if callable(self._run):
            self.function = Named(self._run, op.arguments, self._where)
        elif self._native is not None:
            self.kernel = private.boxed_call_of(self._native)
        else:
            self.kernel = self._load

    def _load(self, *values) -> None:
        """The first call of a Triton kernel: imports its module and triton."""
        module, _, function = self._run.rpartition(".")
        launcher = getattr(importlib.import_module(f"fastseg.kernels.{module}"), function)
        named = Named(launcher, self._values, self._where)
        pick = named.pick
        self.kernel = lambda *values: launcher(*pick(values))
        self.kernel(*values)

    def why_not(self, args: tuple) -> str | None:
        """None if this backend can run the call, else the reason."""
        first = args[0]
        # The device first: `missing` may initialise CUDA, which a process without GPU tensors must not (it may fork).
        device = first.device.type
        if self.name == "cpu" or (self.name == "triton" and _library.interpreting()):
            fits = device == "cpu"
        else:
            fits = device == "cuda" or self.name == "reference"
        if not fits:
            wanted = "cpu" if self.name == "cpu" or _library.interpreting() else "cuda"
            return f"tensors are on {first.device}; it runs on {wanted}"
        if not self._available:
            reason = self.missing()
            if reason is not None:
                return reason
        if self.dtypes is not None and first.dtype not in self.dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"dtype {str(first.dtype).removeprefix('torch.')}; supported: {names}"
        refuses = self.refuses
        return None if refuses is None else refuses.function(*refuses.pick(args))

    def missing(self) -> str | None:
        """None if this backend's code exists and this machine can run it, else the reason."""
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
    """PyTorch's own function as a backend: "auto" takes it for small CPU tensors, where one call into C++ is faster.

    run: a function of the arguments, differentiated by PyTorch; returns what the op returns, or of several outputs
        those that the public function uses. The user sees the errors it raises.
    below: for each class of calls, the number of elements of the first argument below which "auto" takes it.
    which: returns the class of a call, a key of `below`, or None if stock is never faster; by default the only key.
    refuses: returns the reason why stock would break a promise of the op on this call, or crash, or None.
    on_gpu: True if "auto" takes it for this call on a GPU; by default never.
    fused: True if a compiled CPU program is faster with it at any size, since the compiler joins it to its neighbours;
        by default never.
    compiles_to_itself: whether a compiled program calls the same kernel, so that `below` holds there, too.
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
        fused: Callable[..., bool] | None = None,
        compiles_to_itself: bool = False,
    ):
        self._run, self.below, self._which, self._refuses = run, dict(below), which, refuses
        self._on_gpu, self._fused, self._compiles_to_itself = on_gpu, fused, compiles_to_itself

    def bind(self, op: "Bound") -> None:
        self._only = None if self._which else next(iter(self.below))
        self.function = Named(self._run, op.arguments, f"{op.name}, stock")
        self.which = None if self._which is None else Named(self._which, op.arguments, f"{op.name}, stock: which")
        self.refuses = Named(self._refuses or (lambda: None), op.arguments, f"{op.name}, stock: refuses")
        self.on_gpu = Named(self._on_gpu or (lambda: False), op.arguments, f"{op.name}, stock: on_gpu")
        self.fused = Named(self._fused or (lambda: False), op.arguments, f"{op.name}, stock: fused")

    def why_not(self, args: tuple) -> str | None:
        return self.refuses(args)

    def missing(self) -> None:
        return None

    def is_faster(self, args: tuple) -> bool:
        """True if "auto" leaves this call to stock PyTorch.

        False in a traced program: the comparison would restrict the sizes that the program accepts.
        """
        first, which, refuses = args[0], self.which, self.refuses
        elements = first.numel()
        if type(elements) is not int:
            return False
        if not first.is_cpu:
            return first.is_cuda and self.on_gpu(args) and self.refuses(args) is None
        kind = self._only if which is None else which.function(*which.pick(args))
        if kind is None or elements >= self.below[kind]:
            return False
        return refuses.function(*refuses.pick(args)) is None

    def is_faster_compiled(self, args: tuple) -> bool:
        """`is_faster` in a program of torch.compile or torch.export, whose code for a function of torch's can be much
        slower than the function: only if stock is faster at any size, `fused`, or compiled to itself. Not if sizes
        vary, which the answer would restrict.
        """
        first = args[0]
        if not all(private.has_fixed_size(value) for value in args if isinstance(value, torch.Tensor)):
            return False
        if first.is_cpu:
            faster = self._is_below_compiled_limit(args) or self.fused(args)
        else:
            faster = first.is_cuda and self.on_gpu(args)
        return faster and self.refuses(args) is None

    def _is_below_compiled_limit(self, args: tuple) -> bool:
        if not self._compiles_to_itself and ALWAYS not in self.below.values():
            return False
        kind = self._only if self.which is None else self.which(args)
        if kind is None:
            return False
        limit = self.below[kind]
        return limit == ALWAYS or (self._compiles_to_itself and args[0].numel() < limit)


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

    cuda: the dtypes of a CUDA kernel; triton: the path of a Triton launcher, for fp32 and half types.
    """
    table: list[Backend | Stock] = [stock] if stock else []
    table.append(Backend("cpu", dtypes=cpu))
    if cuda is not None:
        table.append(Backend("cuda", dtypes=cuda))
    if triton is not None:
        table.append(Backend("triton", triton, dtypes=FLOATING_GPU if cpu else None, refuses=refuses_triton))
    return [*table, Backend("reference", reference)]
