"""The one place for schemas, backend choice, autograd and fakes: `Op`.

    scale = Op(
        "scale(Tensor input, float factor) -> Tensor output",
        check=lambda input: ...,
        outputs=lambda input: torch.empty_like(input),
        backward=lambda grad_output, factor, backend: {"input": scale(grad_output, factor, backend=backend)},
        backends=[
            Stock(lambda input, factor: input * factor, below={"scale": 1 << 16}),
            Backend("cpu", dtypes=FLOATING),
            Backend("triton", "scale.triton.scale", dtypes=FLOATING_GPU),
            Backend("reference", reference.scale),
        ],
    )

Callbacks are plain functions whose parameter names say what they get: any argument of the schema, any output,
`grad_<output>`, `needs_<argument>`, `shape_<argument>` (which keeps no tensor alive), `backend`. Names are resolved
once, when the op is defined (a name that the schema lacks is an error there), into positions: a call makes no
dictionary of them. CONTRIBUTING.md follows one op through this file.

Environment: FASTSEG_BACKEND=<name> is what `backend="auto"` means (for debugging; it never falls back).
"""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastseg import _library
from fastseg import _private_api as private
from fastseg._dtypes import accumulator
from fastseg._layout import in_format_of_first

BACKEND_NAMES = ("stock", "cpu", "cuda", "triton", "reference")

_definitions = torch.library.Library("fastseg", "DEF")
NATIVE_SCHEMAS: list[str] = []  # every C++ entry point, so that the CUDA emulator can define them a second time
REGISTRY: dict[str, "Op"] = {}  # every Op by name, in order of import


class BackendError(RuntimeError):
    """No backend can run this call; the message gives each backend's reason."""


class Explanation(Exception):
    """Raised instead of running, while `explaining` is on: what would run, and why."""


explaining = False  # set by fastseg.info.explain


class Named:
    """A function of some of an op's values, which it asks for by the names of its parameters."""

    __slots__ = ("function", "pick")

    def __init__(self, function: Callable, names: Sequence[str], what: str):
        wanted = list(inspect.signature(function).parameters)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise TypeError(f"{what} asks for {', '.join(unknown)}; there are {', '.join(names)}")
        positions = [names.index(name) for name in wanted]
        if len(positions) == 1:  # itemgetter gives a tuple only for several
            self.pick = itemgetter(slice(positions[0], positions[0] + 1))
        else:
            self.pick = itemgetter(*positions) if positions else itemgetter(slice(0, 0))
        self.function = function

    def __call__(self, values: tuple):
        return self.function(*self.pick(values))


class Backend:
    """One way to run an op, and the conditions under which it may: the predicate that decides is the one that explains.

    name: "cpu", "cuda", "triton" or "reference".
    run: "cpu" and "cuda" take none: they are the C++ entry point `fastseg::_<op>`, which takes the arguments and then
        the outputs to fill, as every kernel does. "triton": where its launcher stands, "<module>.<function>" below
        fastseg.kernels, imported when it is first called; it fills the outputs among its parameters. "reference": a
        plain function of the arguments that returns the outputs.
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

    def bind(self, op: "Op") -> None:
        """Resolves names and the C++ entry point for the op whose table this stands in."""
        self._native = op.native_name if self.name in ("cpu", "cuda") else None
        self._values = (*op.arguments, *op.results)
        self._where = f"{op.name}, backend {self.name}"
        refuses = self._refuses
        self.refuses = None if refuses is None else Named(refuses, op.arguments, f"{self._where}: refuses")
        if self.name == "reference":
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
        reason = _library.missing(self.name)
        if reason is None and self._native is not None:
            key = "CUDA" if self.name == "cuda" else "CPU"
            if not private.has_kernel(self._native, key):
                reason = f"the loaded library does not implement {self._native} for {key}: rebuild it " \
                         f"({_library.HOW_TO_BUILD})"
        self._available = reason is None
        return reason


class Stock:
    """PyTorch's own function as a backend: "auto" takes it for small CPU tensors, where one call into C++ ends sooner.

    run: a plain function of the arguments, differentiated by PyTorch; returns what the op returns, None for outputs
        that the public function does not use. What it raises reaches the user.
    below: by class of calls, the number of elements of the first argument below which "auto" takes it.
    which: names the class of a call, a key of `below`, or None where it is never faster; by default the only key.
    refuses: gives the reason why stock does not keep every promise of the op on this call, or None.
    """

    name, dtypes = "stock", None

    def __init__(
        self,
        run: Callable,
        *,
        below: Mapping[str, int],
        which: Callable[..., str | None] | None = None,
        refuses: Callable[..., str | None] | None = None,
    ):
        self._run, self.below, self._which, self._refuses = run, dict(below), which, refuses

    def bind(self, op: "Op") -> None:
        (only,) = self.below if self._which is None else (None,)
        self.function = Named(self._run, op.arguments, f"{op.name}, stock")
        self.which = Named(self._which or (lambda: only), op.arguments, f"{op.name}, stock: which")
        self.refuses = Named(self._refuses or (lambda: None), op.arguments, f"{op.name}, stock: refuses")

    def why_not(self, args: tuple) -> str | None:
        return self.refuses(args)

    def missing(self) -> None:
        return None

    def is_faster(self, args: tuple) -> bool:
        """True if "auto" leaves this call to stock PyTorch.

        Never in a traced program, where the answer would become a condition on the sizes that it takes.
        """
        lead, which, refuses = args[0], self.which, self.refuses
        if not lead.is_cpu:
            return False
        kind = which.function(*which.pick(args))
        if kind is None:
            return False
        elements = lead.numel()
        if type(elements) is not int or elements >= self.below[kind]:
            return False
        return refuses.function(*refuses.pick(args)) is None


def parse(schema: str) -> tuple[str, list[str], list[str]]:
    """Name, argument names and output names of `name(Tensor a, int b) -> (Tensor c, Tensor d)`."""
    name, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> \(?(.*?)\)?", schema).groups()
    last_words = [[part.split()[-1] for part in text.split(", ") if part] for text in (arguments, returns)]
    return name, *last_words


def native_schema(schema: str) -> str:
    """The schema of the C++ entry point: `_<name>(arguments, outputs to fill) -> ()`."""
    name, _, rest = schema.partition("(")
    arguments, _, returns = rest.rpartition(") -> ")
    outputs = [part.split()[-1] for part in returns.strip("()").split(", ")]
    filled = [f"Tensor({letter}!) {output}" for letter, output in zip("abcdefgh", outputs)]
    return f"_{name}({', '.join([arguments.replace('SymInt', 'int'), *filled])}) -> ()"


THROUGH_REFERENCE = object()


class Op:
    """An op `torch.ops.fastseg.<name>` with several backends.

    schema: `name(arguments) -> (outputs)`, every output named; `str backend="auto"` is appended as the last argument.
        The first argument is a tensor.
    check: semantic validation, for eager and traced calls alike; never looks at data.
    outputs: allocates what the op returns; on tensors without data it is the fake.
    backends: in the order in which "auto" tries them.
    contiguous: arguments that kernels get contiguous. accumulated: those that they get in the accumulator's dtype of
        the first argument, too. image_layout: (N, C, H, W) arguments that they get dense in one memory format, that of
        the first of them (`fastseg._layout.image_format`).
    backward: gives {argument: gradient}. What it names is what is saved. Outputs whose gradient it does not name are
        not differentiable. A gradient is None where nothing arrives, unless it names several.
        THROUGH_REFERENCE, for ops that are a backward themselves: the op differentiates through its own reference
        with respect to all its floating tensor arguments.
    """

    def __init__(
        self,
        schema: str,
        *,
        outputs: Callable[..., Any],
        backends: Sequence[Backend | Stock],
        check: Callable[..., None] | None = None,
        backward: Callable[..., dict[str, Tensor | None]] | object | None = None,
        contiguous: Sequence[str] = (),
        accumulated: Sequence[str] = (),
        image_layout: Sequence[str] = (),
    ):
        self.name, self.arguments, self.results = parse(schema)
        self.names = tuple(self.arguments)
        self.native_name = f"_{self.name}"
        self.stock = next((backend for backend in backends if backend.name == "stock"), None)
        self.backends = tuple(backend for backend in backends if backend.name != "stock")
        self._check = Named(check or (lambda: None), self.arguments, f"{self.name}.check")
        self._outputs = Named(outputs, self.arguments, f"{self.name}.outputs")
        self._single = len(self.results) == 1
        self._contiguous = [self.arguments.index(name) for name in (*contiguous, *accumulated)]
        self._accumulated = [self.arguments.index(name) for name in accumulated]
        self._images = [self.arguments.index(name) for name in image_layout]
        if any(backend.name in ("cpu", "cuda") for backend in self.backends):
            NATIVE_SCHEMAS.append(native_schema(schema))
            _definitions.define(NATIVE_SCHEMAS[-1])
        for backend in backends:
            backend.bind(self)
        self._reference = next(backend for backend in self.backends if backend.name == "reference").function
        self._define(schema)
        self._apply = self._transformable = None
        if backward is THROUGH_REFERENCE:
            self._differentiate(*self._through_reference())
        elif backward is not None:
            self._differentiate(*self._by_names(backward))
        REGISTRY[self.name] = self

    def _define(self, schema: str) -> None:
        arguments, _, returns = schema[len(self.name):].rpartition(") -> ")
        full = f'{self.name}{arguments}, str backend="auto") -> {returns}'
        _definitions.define(full, tags=(torch.Tag.pt2_compliant_tag,))
        count = len(self.arguments)
        # The dispatcher drops trailing arguments that equal their default; `backend` alone has one.
        run = lambda *args: self._run(args[:count], *args[count:])  # noqa: E731
        _definitions.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"fastseg::{self.name}", lambda *args: self._fake(args[:count]), lib=_definitions
        )
        self._packet = getattr(torch.ops.fastseg, self.name).default

    # --- one call ---

    def __call__(self, *args, backend: str = "auto", **named):
        if named:
            args += self._in_order(len(args), named)
        if explaining:
            raise Explanation(self.explain(args, backend))
        stock = self.stock
        if stock is not None and self._prefers_stock(args, backend):
            self._check(args)
            return stock.function(args)
        if private.is_watched(args):
            return self._call_watched(args, backend)
        if self._apply is not None and torch.is_grad_enabled():
            for value in args:
                if type(value) in private.PLAIN_TENSORS and value.requires_grad:
                    return self._apply(*args, backend)
        return self._run(args, backend)

    def _in_order(self, given: int, named: Mapping[str, Any]) -> tuple:
        wanted = self.names[given:]
        if tuple(named) == wanted:
            return tuple(named.values())
        if set(named) != set(wanted):
            raise TypeError(f"fastseg.{self.name}: arguments {', '.join(named)}; allowed: {', '.join(wanted)}")
        return tuple(named[name] for name in wanted)

    def _prefers_stock(self, args: tuple, backend: str) -> bool:
        if backend == "auto":
            backend = os.environ.get("FASTSEG_BACKEND", "auto")
        if backend == "auto":
            return not torch.compiler.is_compiling() and self.stock.is_faster(args)
        if backend != "stock":
            return False
        reason = self.stock.why_not(args)
        if reason is not None:
            raise BackendError(f"fastseg.{self.name}: backend='stock' cannot run this call: {reason}")
        return True

    def _call_watched(self, args: tuple, backend: str):
        """Through PyTorch's dispatcher, save where that would drop or refuse a derivative."""
        if torch.compiler.is_compiling():
            return self._packet(*args, backend)
        transformed = private.in_functional_transform()
        if private.has_tangent(args) or (transformed and private.differentiates_twice()):
            return self._run_reference(args, backend)
        if transformed and self._transformable is not None:
            return self._transformable.apply(*args, backend)
        return self._packet(*args, backend)

    def _run(self, args: tuple, backend: str = "auto"):
        check = self._check
        check.function(*check.pick(args))
        if args[0].is_meta:
            return self._outputs(args)
        return self._execute(self.choose(args, backend), args)

    def _execute(self, backend: Backend, args: tuple):
        if backend.name == "reference":
            return backend.function(args)
        for position in self._contiguous:
            value = args[position]
            if value is not None and (position in self._accumulated or not value.is_contiguous()):
                args = self._normalised(args)
                break
        for position in self._images:
            if not args[position].is_contiguous():
                args = in_format_of_first(args, self._images)
                break
        outputs = self._outputs
        results = outputs.function(*outputs.pick(args))
        if self._single:
            backend.kernel(*args, results)
        else:
            backend.kernel(*args, *results)
        return results

    def _normalised(self, args: tuple) -> tuple:
        """The arguments with the dtypes and layouts that kernels take."""
        changed = list(args)
        for position in self._contiguous:
            value = args[position]
            if value is not None:
                if position in self._accumulated:
                    value = value.to(accumulator(args[0].dtype))
                changed[position] = value.contiguous()
        return tuple(changed)

    def _run_reference(self, args: tuple, backend: str):
        """By PyTorch's own ops, which know the derivatives that an autograd function does not."""
        if backend not in ("auto", "reference"):
            reason = "in forward-mode or nested torch.func differentiation; allowed: auto, reference"
            raise BackendError(f"fastseg.{self.name}: backend={backend!r} {reason}")
        self._check(args)
        return self._reference(args)

    def _fake(self, args: tuple):
        self._check(args)
        return self._outputs(args)

    # --- the choice of a backend ---

    def choose(self, args: tuple, backend: str = "auto") -> Backend:
        """The kernel or reference that runs this call. Raises BackendError with each backend's reason if none can."""
        if backend == "auto" and "FASTSEG_BACKEND" in os.environ:
            backend = os.environ["FASTSEG_BACKEND"]
        if backend != "auto" and backend not in BACKEND_NAMES:
            raise ValueError(f"fastseg.{self.name}: backend={backend!r}; allowed: auto, {', '.join(BACKEND_NAMES)}")
        for candidate in self.backends:
            if backend in ("auto", candidate.name) and candidate.why_not(args) is None:
                return candidate
        raise BackendError(f"fastseg.{self.name}: backend={backend!r} cannot run this call:\n{self._reasons(args)}")

    def explain(self, args: tuple, backend: str = "auto") -> str:
        """What would run this call, and why the other backends would not."""
        stock = self.stock is not None and self._prefers_stock(args, backend)
        chosen = "stock" if stock else self.choose(args, backend).name
        return f"fastseg.{self.name}: {chosen} runs\n{self._reasons(args)}"

    def _reasons(self, args: tuple) -> str:
        table = {candidate.name: candidate for candidate in (self.stock, *self.backends) if candidate is not None}
        lines = []
        for name in BACKEND_NAMES:
            reason = table[name].why_not(args) if name in table else "this op has no such backend"
            if name == "stock" and reason is None and not self.stock.is_faster(args):
                reason = "can; passed over by auto: ours is faster at this size"
            lines.append(f"  {name}: {reason or 'can'}")
        return "\n".join(lines)

    # --- autograd ---

    def _differentiate(self, save: Callable, backward: Callable) -> None:
        """Makes the autograd functions of `save(ctx, values)`, values being (arguments, backend, outputs), and backward.

        Three of them, alike: for plain eager calls, for torch.func, and for the dispatcher.
        """
        single = self._single

        def together(inputs: tuple, output) -> tuple:
            inputs = inputs if len(inputs) > len(self.arguments) else (*inputs, "auto")
            return (*inputs, output) if single else (*inputs, *output)

        def forward_and_save(ctx, *args):
            output = self._run(args[:-1], args[-1])
            save(ctx, (*args, output) if single else (*args, *output))
            return output

        def forward(*args):
            # Inside of vmap the tensors are batches: the dispatcher takes them apart.
            return self._packet(*args) if private.in_functional_transform() else self._run(args[:-1], args[-1])

        def setup_context(ctx, inputs, output):
            save(ctx, together(inputs, output))

        eager = self._function(forward=forward_and_save, backward=backward)
        self._apply = private.apply_of(eager)
        self._transformable = self._function(forward=forward, setup_context=setup_context, backward=backward)
        self._transformable.generate_vmap_rule = True
        torch.library.register_autograd(
            f"fastseg::{self.name}", backward, setup_context=setup_context, lib=_definitions
        )

    def _function(self, **members: Callable) -> type[torch.autograd.Function]:
        statics = {name: staticmethod(member) for name, member in members.items()}
        return type(self.name, (torch.autograd.Function,), statics)

    def _by_names(self, backward: Callable) -> tuple[Callable, Callable]:
        """(save, backward) of a backward that names what it needs."""
        shapes = [f"shape_{argument}" for argument in self.arguments]
        held = [*self.arguments, "backend", *self.results, *shapes]  # what a forward can hand on, in order
        first_shape = len(held) - len(shapes)
        gradients = [f"grad_{result}" for result in self.results]
        needs = [f"needs_{argument}" for argument in self.arguments]
        wanted = list(inspect.signature(backward).parameters)
        kept = [held.index(name) for name in wanted if name in held]
        call = Named(backward, [*(held[position] for position in kept), *gradients, *needs], f"{self.name}.backward")
        first_result = len(self.arguments) + 1
        differentiable = [name in wanted for name in gradients]
        constant_results = [first_result + i for i, has in enumerate(differentiable) if not has]
        several = sum(differentiable) > 1
        arguments = self.arguments
        nothing = (None,) * (len(arguments) + 1)

        def save(ctx, values: tuple) -> None:
            tensors, constants = [], []
            for position in kept:
                value = values[position] if position < first_shape else values[position - first_shape].shape
                is_tensor = isinstance(value, Tensor)
                tensors.append(value if is_tensor else None)
                constants.append(None if is_tensor else value)
            ctx.save_for_backward(*tensors)
            ctx.constants = constants
            if constant_results:
                ctx.mark_non_differentiable(*[values[position] for position in constant_results])
            if not several:
                ctx.set_materialize_grads(False)

        def run(ctx, *grad_outputs):
            for grad in grad_outputs:
                if grad is not None:
                    break
            else:
                return nothing
            saved = ctx.saved_tensors
            values = [value if tensor is None else tensor for tensor, value in zip(saved, ctx.constants)]
            found = call.function(*call.pick((*values, *grad_outputs, *ctx.needs_input_grad)))
            return (*[found.get(argument) for argument in arguments], None)

        return save, run

    def _through_reference(self) -> tuple[Callable, Callable]:
        """(save, backward) by autograd through the reference, for every floating tensor argument."""
        count = len(self.arguments)

        def save(ctx, values: tuple) -> None:
            args = values[:count]
            ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in args))
            ctx.constants = [None if isinstance(value, Tensor) else value for value in args]

        def run(ctx, *grad_outputs):
            args = [value if tensor is None else tensor for tensor, value in zip(ctx.saved_tensors, ctx.constants)]
            wanted = [
                i for i, value in enumerate(args)
                if isinstance(value, Tensor) and value.is_floating_point() and ctx.needs_input_grad[i]
            ]

            def function(*leaves):
                filled = list(args)
                for i, leaf in zip(wanted, leaves):
                    filled[i] = leaf
                return self._reference(tuple(filled))

            found = dict(zip(wanted, vjp(function, [args[i] for i in wanted], grad_outputs)))
            return (*(found.get(i) for i in range(count)), None)

        return save, run


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
