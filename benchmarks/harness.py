"""The definition of a benchmark, `Case`: workload, our call, peers, minimal bytes, targets; and how it is called.

A file `benchmarks/ops/<op>.py` exports `CASES`, a list of `Case`; all other modules use those lists.
"""

import importlib
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Shape = tuple[int, ...]
Inputs = tuple  # arguments of the case's functions; the first is the tensor that gets a gradient

OURS = "fastseg"
ALLOCATORS = ("default", "tuned")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Peer:
    """A function to compare with, called with the same inputs as our op.

    `layout` None keeps the case's layout. `compiled` passes `run` through `torch.compile` first. `dtype` None
    keeps the case's dtype. `missing`: the reason why the peer cannot run on this machine (a package that is
    not installed), or None. `devices`: where it runs. `ours` marks fastseg under other conditions, which is
    shown for comparison but is never the best peer.
    """

    run: Callable
    layout: str | None = None
    compiled: bool = False
    dtype: torch.dtype | None = None
    missing: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False


@dataclass(frozen=True)
class Target:
    """A figure that the case must reach.

    `kind`: "speedup" (peer's time / ours, at least), "extra_memory" (peak extra bytes, at most),
    "memory_ratio" (peer's peak extra / ours, at least) or "bandwidth" (share of the measured copy bandwidth,
    at least). `peer`: a peer's name, or "best" for the fastest peer (for memory: the smallest) of the same
    run. `allocator`: "default" or "tuned"; on CUDA there is only "default".
    """

    kind: str
    value: float
    peer: str = "best"
    allocator: str = "tuned"
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """One workload of one op.

    `make(shape, device, dtype, layout)` returns the inputs; the first is differentiated if `backward` is set.
    `minimal_bytes(shape, dtype)`: the bytes that any implementation must move across the memory bus: inputs read
    as often as the algorithm must, outputs written once. `flops(shape)` is optional. `verify(case, inputs)`
    returns None or says how our result is wrong. `allocators`: those of the CPU to measure with. `compiled` passes
    `ours` through `torch.compile`, to compare with compiled peers.
    """

    op: str
    shape: Shape
    make: Callable[[Shape, torch.device, torch.dtype, str], Inputs]
    ours: Callable
    peers: dict[str, Peer]
    minimal_bytes: Callable[[Shape, torch.dtype], int]
    verify: Callable[["Case", Inputs], str | None]
    name: str = ""
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    backward: bool = True
    flops: Callable[[Shape], float] | None = None
    targets: tuple[Target, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    allocators: tuple[str, ...] = ALLOCATORS
    compiled: bool = False
    quick_shape: Shape | None = None

    @property
    def title(self) -> str:
        """The name of this case, unique in its file."""
        return f"{self.op} {self.workload}"

    @property
    def workload(self) -> str:
        """The title without the op."""
        parts = [self.name, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        if self.layout != "contiguous":
            parts.append(self.layout)
        return " ".join(part for part in parts if part)

    def prepared(self) -> "Case":
        """The same case with `ours` compiled, if it is `compiled`."""
        return replace(self, ours=specialised(self.ours), compiled=False) if self.compiled else self

    def quick(self) -> "Case":
        """The same case at a size that takes milliseconds, without targets."""
        return replace(self, shape=self.quick_shape or shrink(self.shape), targets=())


def specialised(function: Callable) -> Callable:
    """`function` compiled for the shapes that it is called with, which gives the compiler's fastest code."""
    return torch.compile(function, dynamic=False)


def shrink(shape: Shape) -> Shape:
    """Batch 1 and an eighth of each spatial extent (odd ones stay odd), classes kept."""
    spatial = tuple(max(1, extent // 8 | extent & 1) for extent in shape[2:])
    return (1, shape[1], *spatial)


def op_names() -> list[str]:
    """The names of the benchmark files."""
    import benchmarks.ops

    return sorted(module.name for module in pkgutil.iter_modules(benchmarks.ops.__path__))


def cases_of(op: str) -> list[Case]:
    """The `CASES` of `benchmarks/ops/<op>.py`; titles are checked to be unique."""
    cases = importlib.import_module(f"benchmarks.ops.{op}").CASES
    titles = [case.title for case in cases]
    if len(set(titles)) != len(titles):
        raise ValueError(f"benchmarks/ops/{op}.py: two cases share a title: {sorted(titles)}")
    return cases


def differentiable(inputs: Inputs, backward: bool) -> Inputs:
    """The inputs with a new leaf as first tensor; it requires grad if `backward` is set."""
    first = inputs[0].detach()
    return (first.requires_grad_(backward), *inputs[1:])


def converted(inputs: Inputs, layout: str, dtype: torch.dtype) -> Inputs:
    """The inputs with every floating tensor in `dtype` and every 4-d tensor in `layout`; copied only if necessary."""

    def convert(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(dtype) if value.is_floating_point() else value
        return value.contiguous(memory_format=MEMORY_FORMATS[layout]) if value.dim() == 4 else value

    return tuple(convert(value) for value in inputs)


def first_tensor(result) -> torch.Tensor:
    """The tensor of a result to differentiate: the values, not their indices."""
    return result[0] if isinstance(result, tuple) else result


def step(function: Callable, inputs: Inputs, backward: bool, gradient: torch.Tensor | None = None) -> Callable:
    """A call without arguments: forward, and backward with a new gradient if `backward` is set.

    `gradient` is that of the result; only a scalar needs none.
    """
    inputs = differentiable(inputs, backward)
    first = inputs[0]

    def forward_only():
        with torch.no_grad():
            return function(*inputs)

    def forward_and_backward():
        first.grad = None
        result = function(*inputs)
        first_tensor(result).backward(gradient)
        return result

    return forward_and_backward if backward else forward_only


@dataclass(frozen=True)
class Contestant:
    """A function to time, and its inputs."""

    run: Callable
    inputs: Inputs
    ours: bool

    def step(self, backward: bool, inputs: Inputs | None = None) -> Callable:
        return step(self.run, self.inputs if inputs is None else inputs, backward)


def contestants(case: Case, inputs: Inputs, device: str) -> tuple[dict[str, Contestant], dict[str, str]]:
    """By name, ours (first) and the peers that run here, and the reasons why the others do not."""
    prepared = {(case.layout, case.dtype): inputs}
    running = {OURS: Contestant(case.ours, inputs, ours=True)}
    skipped = {}
    for name, peer in case.peers.items():
        if peer.missing is not None or device not in peer.devices:
            skipped[name] = peer.missing or f"does not run on {device}"
            continue
        key = (peer.layout or case.layout, peer.dtype or case.dtype)
        if key not in prepared:
            prepared[key] = converted(inputs, *key)
        run = specialised(peer.run) if peer.compiled else peer.run
        running[name] = Contestant(run, prepared[key], peer.ours)
    return running, skipped


def check(case: Case, inputs: Inputs) -> str | None:
    """None, or how our result is wrong on these inputs. An exception of ours is a failed check, not a crash."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case.verify(case, inputs)
    except Exception as error:  # after any error the case must not be timed
        return f"{type(error).__name__}: {error}".splitlines()[0]
