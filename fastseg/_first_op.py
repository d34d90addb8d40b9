"""The one place for schema definition, backend choice, autograd and fakes.

`Op` registers `torch.ops.fastseg.<name>` and chooses, per call, which `Backend` runs it. `native` defines the
schema of a C++ entry point. See CONTRIBUTING.md for the path of one op through this file.

Environment: FASTSEG_BACKEND=<name> is what `backend="auto"` means (for debugging; it never falls back).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastseg import _library

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLOATING_GPU = (torch.float32, torch.float16, torch.bfloat16)
BACKEND_NAMES = ("cpu", "cuda", "triton", "reference")

_definitions = torch.library.Library("fastseg", "FRAGMENT")
from fastseg._op import NATIVE_SCHEMAS, REGISTRY  # noqa: E402

# "function: of what" -> elements of a CPU tensor below which "auto" leaves a call to stock PyTorch, as measured: one
# call into torch's C++ ends sooner than one of ours, which comes from Python.
STOCK_BELOW: dict[str, int] = {}


class BackendError(RuntimeError):
    """No backend can run this call; the message gives each backend's reason."""


class NativeOp:
    """A C++ entry point `fastseg::<name>`: its schema is defined here, libfastseg_*.so registers implementations."""

    def __init__(self, schema: str):
        self.name = schema.partition("(")[0]
        _definitions.define(schema)
        NATIVE_SCHEMAS.append(schema)
        self._packet = getattr(torch.ops.fastseg, self.name).default
        self._keys: set[str] = set()  # found implemented, which is not asked again

    def __call__(self, *args):
        return self._packet(*args)

    def missing(self, key: str) -> str | None:
        if key in self._keys:
            return None
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseg::{self.name}", key):
            self._keys.add(key)
            return None
        return f"the loaded library does not implement {self.name} for {key}: rebuild it ({_library.HOW_TO_BUILD})"


def native(schema: str) -> NativeOp:
    """Defines `fastseg::<schema>`, which C++ implements; gives the callable that stands in backend tables."""
    return NativeOp(schema)


def _never(*args) -> None:
    return None


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`; there is none for meta tensors."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def in_functional_transform() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def few_for_auto(backend: str, lead: Tensor, fewest: float) -> bool:
    """Whether "auto" leaves a call on `lead` to stock PyTorch because it has fewer than `fewest` elements.

    Never while exporting, where the answer would become a condition on the sizes the program takes.
    """
    return (
        backend == "auto"
        and lead.device.type == "cpu"
        and not torch.compiler.is_exporting()
        and lead.numel() < fewest
        and "FASTSEG_BACKEND" not in os.environ
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def somebody_watches(args: tuple) -> bool:
    """Whether a call may not go straight to the backends, because something wants to see it: a tracer or
    another mode, torch.func, forward-mode differentiation, the profiler, or a tensor subclass.
    """
    for value in args:  # a loop: a generator costs a microsecond more
        if type(value) not in _PLAIN and isinstance(value, Tensor):
            return True
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or in_functional_transform()
        or forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def _has_tangent(args: tuple) -> bool:
    """Whether forward-mode differentiation goes through a call."""
    tensors = (value for value in args if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@dataclass(frozen=True)
class Backend:
    """One way to run an op, and the conditions under which it may: the predicate that decides is the one that explains.

    name: "cpu", "cuda", "triton" or "reference".
    run: takes the op's positional arguments without `backend`.
    dtypes: allowed dtypes of the op's first argument; None for any.
    refuses: gives the reason why this call cannot run here, or None.
    slower: gives the reason why "auto" passes this backend over (stock PyTorch is as fast), or None.
    """

    name: str
    run: Callable[..., Any]
    dtypes: Sequence[torch.dtype] | None = None
    refuses: Callable[..., str | None] = _never
    slower: Callable[..., str | None] = _never

    def why_not(self, lead: Tensor, args: tuple) -> str | None:
        """None if this backend can run the call, else the reason."""
        # The device first: asking for a GPU initialises CUDA, which a process that uses none (and forks) must not do.
        reason = self._wrong_device(lead) or _library.missing(self.name)
        if reason is None and isinstance(self.run, NativeOp):
            reason = self.run.missing("CUDA" if self.name == "cuda" else "CPU")
        if reason is None and self.dtypes is not None and lead.dtype not in self.dtypes:
            reason = f"dtype {_name(lead.dtype)}; supported: {', '.join(_name(dtype) for dtype in self.dtypes)}"
        return reason or self.refuses(*args)

    def _wrong_device(self, lead: Tensor) -> str | None:
        if self.name == "reference":
            return None
        wanted = "cpu" if self.name == "cpu" or (self.name == "triton" and _library.interpreting()) else "cuda"
        return None if lead.device.type == wanted else f"tensors are on {lead.device}; it runs on {wanted}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def vjp(function: Callable, inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Vector-Jacobian product of a plain PyTorch function of tensors, by autograd."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    pairs = [(output, grad) for output, grad in zip(outputs, grad_outputs) if grad is not None and output.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    return torch.autograd.grad([output for output, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)


class Op:
    """An op `torch.ops.fastseg.<name>` with several backends.

    schema: without the name; `, str backend="auto"` is appended as the last argument. The first argument is a tensor.
    check: semantic validation, called with the arguments by eager and fake alike; never looks at data.
    fake: like the op, on tensors without data; gives outputs of the right shape, dtype, strides and device.
    backends: in the order in which "auto" tries them.
    save, backward: setup_context and backward as torch.library.register_autograd takes them; `backward` gives
        one gradient per argument, without `backend`.
    differentiable: instead of save and backward, for backward ops: the op differentiates through its own
        "reference" backend with respect to all its floating tensor arguments (the double backward of the op
        it belongs to).
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        backends: Sequence[Backend],
        check: Callable[..., None] = _never,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        differentiable: bool = False,
    ):
        arguments, _, returns = schema.rpartition("->")
        arguments = arguments.strip().removesuffix(")")
        self.name, self.check, self.backends = name, check, tuple(backends)
        self._fake = fake
        self._reference = next(candidate.run for candidate in backends if candidate.name == "reference")
        _definitions.define(f'{name}{arguments}, str backend="auto") ->{returns}', tags=(torch.Tag.pt2_compliant_tag,))
        _definitions.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastseg::{name}", self._run_fake, lib=_definitions)
        if differentiable:
            save, backward = self._save_everything, self._backward_through_reference
        self._function = self._transformable = None
        if backward is not None:
            with_backend = lambda ctx, *grads: (*backward(ctx, *grads), None)  # noqa: E731
            self._function = self._autograd_function(save, with_backend)
            # Function.apply would first look for transforms of torch.func, which __call__ has done.
            self._apply = super(torch.autograd.Function, self._function).apply
            self._transformable = self._transformable_function(save, with_backend)
            torch.library.register_autograd(
                f"fastseg::{name}", self._function.backward, setup_context=save, lib=_definitions
            )
        self._packet = getattr(torch.ops.fastseg, name).default
        self._count = len(self._packet._schema.arguments) - 1  # without `backend`
        REGISTRY[name] = self

    def __call__(self, *args, backend: str = "auto"):
        if somebody_watches(args):
            return self._call_watched(args, backend)
        if self._function is None:
            with torch.no_grad():
                return self._run(*args, backend)
        if torch.is_grad_enabled() and any(type(value) in _PLAIN and value.requires_grad for value in args):
            return self._apply(*args, backend)
        return self._run(*args, backend)

    def _call_watched(self, args: tuple, backend: str):
        """Through PyTorch's dispatcher, save where that would drop or refuse a derivative."""
        if torch.compiler.is_compiling():
            return self._packet(*args, backend)
        if forward_ad._current_level >= 0 and _has_tangent(args):
            return self._run_reference(args, backend)
        if self._transformable is not None and in_functional_transform():
            return self._transformable.apply(*args, backend)
        return self._packet(*args, backend)

    def _autograd_function(self, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
        """What the dispatcher's autograd kernel does, without the 40 microseconds it takes on the way."""

        def forward(ctx, *args):
            outputs = self._run(*args)
            save(ctx, args, outputs)
            return outputs

        return self._function_class(forward=forward, backward=backward)

    def _transformable_function(self, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
        """The same for torch.func, which takes neither that kernel nor a forward that saves."""

        def forward(*args):
            # Inside of vmap the tensors are batches: the dispatcher takes them apart.
            return self._packet(*args) if in_functional_transform() else self._run(*args)

        function = self._function_class(forward=forward, setup_context=save, backward=backward)
        function.generate_vmap_rule = True
        return function

    def _function_class(self, **members: Callable) -> type[torch.autograd.Function]:
        statics = {name: staticmethod(member) for name, member in members.items()}
        return type(self.name, (torch.autograd.Function,), statics)

    def choose(self, *args, backend: str = "auto") -> Backend:
        """The backend that would run this call. Raises BackendError with each backend's reason if none can."""
        if backend == "auto" and "FASTSEG_BACKEND" in os.environ:
            backend = os.environ["FASTSEG_BACKEND"]
        if backend != "auto" and backend not in BACKEND_NAMES:
            raise ValueError(f"fastseg.{self.name}: backend={backend!r}; allowed: auto, {', '.join(BACKEND_NAMES)}")
        lead = args[0]
        for candidate in self.backends:
            if backend not in ("auto", candidate.name):
                continue
            if candidate.why_not(lead, args) is None and (backend != "auto" or candidate.slower(*args) is None):
                return candidate
        raise BackendError(
            f"fastseg.{self.name}: backend={backend!r} cannot run this call:\n{self._reasons(lead, args)}"
        )

    def explain(self, *args, backend: str = "auto") -> str:
        """What would run this call, and why the other backends would not."""
        chosen = self.choose(*args, backend=backend)
        lead = args[0]
        return f"fastseg.{self.name}: {chosen.name} runs\n{self._reasons(lead, args)}"

    def _reasons(self, lead: Tensor, args: tuple) -> str:
        by_name = {candidate.name: candidate for candidate in self.backends}
        lines = []
        for name in BACKEND_NAMES:
            if name not in by_name:
                reason = "this op has no such backend"
            else:
                reason = by_name[name].why_not(lead, args)
                slower = reason is None and by_name[name].slower(*args)
                reason = reason or (f"can; passed over by auto: {slower}" if slower else "can")
            lines.append(f"  {name}: {reason}")
        return "\n".join(lines)

    def _run(self, *args):
        args, backend = self._split(args)
        self.check(*args)
        if args[0].device.type == "meta":
            return self._fake(*args)
        return self.choose(*args, backend=backend).run(*args)

    def _run_reference(self, args: tuple, backend: str):
        """By PyTorch's own ops, which know the forward-mode derivative."""
        if backend not in ("auto", "reference"):
            reason = "in forward-mode automatic differentiation; allowed: auto, reference"
            raise BackendError(f"fastseg.{self.name}: backend={backend!r} {reason}")
        self.check(*args)
        return self._reference(*args)

    def _run_fake(self, *args):
        args, _ = self._split(args)
        self.check(*args)
        return self._fake(*args)

    def _split(self, args: tuple) -> tuple[tuple, str]:
        # The dispatcher drops trailing arguments that equal their default; `backend` alone has one.
        count = self._count
        return args[:count], (args[count] if len(args) > count else "auto")

    @staticmethod
    def _save_everything(ctx, inputs, output):
        inputs = inputs[:-1]
        ctx.positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))

    def _backward_through_reference(self, ctx, *grad_outputs):
        tensors = dict(zip(ctx.positions, ctx.saved_tensors))
        wanted = [i for i, tensor in tensors.items() if tensor.is_floating_point() and ctx.needs_input_grad[i]]

        def function(*leaves):
            arguments = list(ctx.constants)
            for i, tensor in {**tensors, **dict(zip(wanted, leaves))}.items():
                arguments[i] = tensor
            return self._reference(*arguments)

        gradients = dict(zip(wanted, vjp(function, [tensors[i] for i in wanted], grad_outputs)))
        return tuple(gradients.get(i) for i in range(len(ctx.constants)))
