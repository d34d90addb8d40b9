"""`Op`: schemas, backend choice, autograd and fake implementations of all ops.

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

Callbacks are plain functions. The name of a parameter says which value it gets: any argument of the schema, any output,
`grad_<output>`, `needs_<argument>`, `shape_<argument>` (which keeps no tensor alive), `backend`. Names are resolved
into positions once, when the op is defined (a name that the schema lacks raises there): a call makes no dictionary.
CONTRIBUTING.md describes the path of one op through this file.

Environment: FASTSEG_BACKEND=<name>, read at import, is what `backend="auto"` means (for debugging; never falls back).
"""

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseg import _check
from fastseg import _private_api as private
from fastseg._backend import BACKEND_NAMES, Backend, BackendError, Named, Stock, native_schema, parse, picker
from fastseg._dtypes import accumulator
from fastseg._layout import in_format_of_first

AUTO = os.environ.get("FASTSEG_BACKEND", "auto")  # what backend="auto" means

_definitions = torch.library.Library("fastseg", "DEF")
NATIVE_SCHEMAS: list[str] = []  # of all C++ entry points: the CUDA emulator defines them a second time
REGISTRY: dict[str, "Op"] = {}  # every Op by name, in order of import


class Explanation(Exception):
    """Raised by a call in a thread of `explaining`, instead of running: says what would run, and why."""


explaining: set[int] = set()  # ids of the threads in fastseg.info.explain


THROUGH_REFERENCE = object()
_EARLY_GRADIENT_FLAGS = "with_gradient", "to_input", "to_target"  # if true, the forward also computes a gradient


class Op:
    """An op `torch.ops.fastseg.<name>` with several backends.

    schema: `name(arguments) -> (outputs)`, every output named; `str backend="auto"` is appended as the last argument.
        The first argument is a tensor.
    check: semantic validation, for eager and traced calls; never reads data.
    internal: the op is a step of a public function, which has checked the arguments: plain eager calls from Python are
        not checked again; calls through torch.ops.fastseg are checked.
    outputs: allocates what the op returns. On tensors without data this is the fake implementation.
    backends: in the order in which "auto" tries them.
    contiguous: arguments that kernels get contiguous. accumulated: arguments that they get contiguous and in the
        accumulator dtype of the first argument. image_layout: (N, C, H, W) arguments that they get dense and in the
        memory format of the first of these (`fastseg._layout.image_format`).
    backward: returns {argument: gradient}. The forward saves the values that its parameters name. Outputs without a
        `grad_` parameter are not differentiable. The gradient of an output that the loss does not use is None if there
        is one `grad_` parameter, zeros if there are several.
        THROUGH_REFERENCE, for ops that are a backward themselves: autograd differentiates the op's reference with
        respect to all floating tensor arguments.
    saved_if: {output: argument} for outputs that the backward needs only where that boolean argument is true.
    recorded: torch.jit.trace records the op itself, since a trace of its reference would fit inputs of one size only.
    early_gradient: for an op whose last argument says whether the forward also computes the gradient. Callers pass
        False; a plain eager call that autograd records passes what `early_gradient` returns instead.
    """

    def __init__(
        self,
        schema: str,
        *,
        outputs: Callable[..., Any],
        backends: Sequence[Backend | Stock],
        check: Callable[..., None] | None = None,
        backward: Callable[..., dict[str, Tensor | None]] | object | None = None,
        saved_if: Mapping[str, str] = {},
        early_gradient: Callable[..., bool] | None = None,
        internal: bool = False,
        recorded: bool = False,
        contiguous: Sequence[str] = (),
        accumulated: Sequence[str] = (),
        image_layout: Sequence[str] = (),
    ):
        self.name, self.arguments, self.tensors, self.results = parse(schema)
        self.names = tuple(self.arguments)
        self._pick_tensors = picker([self.arguments.index(name) for name in self.tensors])
        self.native_name = f"_{self.name}"
        self.stock = next((backend for backend in backends if backend.name == "stock"), None)
        self.backends = tuple(backend for backend in backends if backend.name != "stock")
        self._is_internal, self._recorded, self._is_backward = internal, recorded, backward is THROUGH_REFERENCE
        self._check = Named(check or (lambda: None), self.arguments, f"{self.name}.check")
        self._outputs = Named(outputs, self.arguments, f"{self.name}.outputs")
        self._has_one_output = len(self.results) == 1
        self._contiguous = [(self.arguments.index(name), name in accumulated) for name in (*contiguous, *accumulated)]
        self._early_gradient = None
        if early_gradient is not None:
            self._early_gradient = Named(early_gradient, self.arguments, f"{self.name}.early_gradient")
        self._saved_if = saved_if
        self._choices: dict[tuple, Backend] = {}  # by (backend, device, dtype), if these alone decide
        self._image_layout = [self.arguments.index(name) for name in image_layout]
        if any(backend.is_native() for backend in self.backends):
            NATIVE_SCHEMAS.append(native_schema(schema))
            _definitions.define(NATIVE_SCHEMAS[-1])
        for backend in backends:
            backend.bind(self)
        self._reference = next(backend for backend in self.backends if backend.name == "reference").function
        self._define(schema)
        self._apply = self._transformable = None
        if backward is THROUGH_REFERENCE:
            self._differentiate_through_reference()
        elif backward is not None:
            self._differentiate_by_names(backward)
        REGISTRY[self.name] = self

    def _define(self, schema: str) -> None:
        arguments, _, returns = schema[len(self.name) :].rpartition(") -> ")
        full = f'{self.name}{arguments}, str backend="auto") -> {returns}'
        _definitions.define(full, tags=(torch.Tag.pt2_compliant_tag,))
        count = len(self.arguments)
        # The dispatcher drops trailing arguments that equal their default; only `backend` has a default.
        run = lambda *args: self._run(args[:count], args[count] if len(args) > count else AUTO)  # noqa: E731
        _definitions.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastseg::{self.name}", lambda *args: self._fake(args[:count]), lib=_definitions)
        self._overload = getattr(torch.ops.fastseg, self.name).default

    # --- one call ---

    def __call__(self, *args, backend: str = "auto", out: Tensor | None = None, **named):
        """out: a tensor that a Triton kernel may fill as the only output, in calls without autograd. If the call
        returns another tensor, `out` was not filled.
        """
        if named:
            args += self._in_order(len(args), named)
        if backend == "auto":
            backend = AUTO
        if torch.compiler.is_compiling():
            if backend == "auto" and self.stock is not None and self.stock.is_faster_compiled(args):
                backend = "stock"
            return self._run_stock(args) if backend == "stock" else self._overload(*args, backend)
        if explaining and threading.get_ident() in explaining:
            raise Explanation(self.explain(args, backend))
        stock = self.stock
        if stock is not None and (stock.is_faster(args) if backend == "auto" else self._asks_for_stock(args, backend)):
            run = stock.function  # a direct call saves a microsecond
            if not self._is_internal:
                self._check.function(*self._check.pick(args))
            return run.function(*run.pick(args))
        tensors = self._pick_tensors(args)
        if private.must_dispatch(tensors):
            return self._call_dispatcher(args, backend)
        if self._apply is not None and torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    if self._early_gradient is not None:
                        args = (*args[:-1], self._early_gradient.function(*self._early_gradient.pick(args)))
                    return self._apply(*args, backend)
        return self._run(args, backend, self._is_internal, out)

    def _in_order(self, given: int, named: Mapping[str, Any]) -> tuple:
        """The values of the named arguments, after the first `given` of the schema."""
        wanted = self.names[given:]
        if tuple(named) == wanted:
            return tuple(named.values())
        if set(named) != set(wanted):
            raise TypeError(f"fastseg.{self.name}: arguments {', '.join(named)}; allowed: {', '.join(wanted)}")
        return tuple(named[name] for name in wanted)

    def _call_dispatcher(self, args: tuple, backend: str):
        """Calls PyTorch's dispatcher, except where that would drop or refuse a derivative."""
        for name, value in zip(self.tensors, self._pick_tensors(args)):
            if value is not None and not isinstance(value, Tensor):
                self._check(args)
                _check.tensor(self.name, name, value)
        if private.is_traced() and not self._recorded:
            return self._run_traced(args)
        transformed = private.in_functional_transform()
        if private.has_tangent(args) or (transformed and private.differentiates_twice(self._pick_tensors(args))):
            return self._run_reference(args, backend)
        if transformed and self._transformable is not None:
            return self._transformable.apply(*args, backend)
        return self._overload(*args, backend)

    def _run(self, args: tuple, backend: str, checked: bool = False, out: Tensor | None = None):
        if not checked:
            check = self._check
            check.function(*check.pick(args))
        if args[0].is_meta:
            return self._outputs(args)
        first = args[0]
        chosen = self._choices.get((backend, first.device, first.dtype)) or self.choose(args, backend)
        if chosen.function is not None:
            return chosen.function(args)
        for position, accumulated in self._contiguous:
            value = args[position]
            if value is not None:
                if accumulated:
                    value = value.to(accumulator(first.dtype))
                if value is not args[position] or not value.is_contiguous():
                    args = (*args[:position], value.contiguous(), *args[position + 1 :])
        for position in self._image_layout:
            if args[position] is not None and not args[position].is_contiguous():
                args = in_format_of_first(args, self._image_layout)
                break
        outputs = self._outputs
        results = out if out is not None and chosen.name == "triton" else outputs.function(*outputs.pick(args))
        if self._has_one_output:
            chosen.kernel(*args, results)
        else:
            chosen.kernel(*args, *results)
        return results

    def _asks_for_stock(self, args: tuple, backend: str) -> bool:
        if backend != "stock":
            return False
        reason = self.stock.why_not(args)
        if reason is not None:
            raise BackendError(f"fastseg.{self.name}: backend='stock' cannot run this call: {reason}")
        return True

    def _run_stock(self, args: tuple):
        if self.stock is None:
            raise BackendError(f"fastseg.{self.name}: backend='stock' cannot run this call:\n{self._reasons(args)}")
        self._check(args)
        return self.stock.function(args)

    def _run_reference(self, args: tuple, backend: str):
        """Runs PyTorch's own ops, for derivatives that an autograd function does not support."""
        if backend not in ("auto", "reference"):
            reason = "in forward-mode or nested torch.func differentiation; allowed: auto, reference"
            raise BackendError(f"fastseg.{self.name}: backend={backend!r} {reason}")
        return self._run_definition(args)

    def _run_definition(self, args: tuple):
        """Runs the reference, whose ops PyTorch differentiates: the forward computes no gradient."""
        self._check(args)
        if not self._is_backward:
            args = tuple(False if name in _EARLY_GRADIENT_FLAGS else value for name, value in zip(self.names, args))
        return self._reference(args)

    def _run_traced(self, args: tuple):
        """Runs PyTorch's own ops, for every `backend`: the program that torch.jit.trace records can then be
        differentiated, accepts inputs of other sizes and needs no fastseg.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # from the checks
            if self.stock is not None and self.stock.why_not(args) is None:
                return self._run_stock(args)
            return self._run_definition(args)

    def _fake(self, args: tuple):
        self._check(args)
        return self._outputs(args)

    # --- the choice of a backend ---

    def choose(self, args: tuple, backend: str = "auto") -> Backend:
        """The kernel or reference that runs this call. Raises BackendError with each backend's reason if none can."""
        first = args[0]
        kind = backend, first.device, first.dtype
        if backend != "auto" and backend not in BACKEND_NAMES:
            raise ValueError(f"fastseg.{self.name}: backend={backend!r}; allowed: auto, {', '.join(BACKEND_NAMES)}")
        refusals = False  # True if a predicate depends on more than device and dtype
        for candidate in self.backends:
            if backend in ("auto", candidate.name):
                refusals = refusals or candidate.refuses is not None
                if candidate.why_not(args) is None:
                    if not refusals:
                        self._choices[kind] = candidate
                    return candidate
        raise BackendError(f"fastseg.{self.name}: backend={backend!r} cannot run this call:\n{self._reasons(args)}")

    def explain(self, args: tuple, backend: str = "auto") -> str:
        """Says what would run this call, and why the other backends would not."""
        self._check(args)
        stock = self.stock
        faster = stock is not None and (backend == "stock" or (backend == "auto" and stock.is_faster(args)))
        chosen = "stock" if faster and stock.why_not(args) is None else self.choose(args, backend).name
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

    def _differentiate(
        self, kept: Sequence[str], differentiable: Sequence[str], backward: Callable, shapes: Sequence[str] = ()
    ) -> None:
        """Makes the autograd functions: for plain eager calls, for torch.func, and for the dispatcher.

        kept: the arguments, "backend" and outputs that `backward` needs; shapes: arguments whose shapes it needs.
        differentiable: outputs. backward(values, grads, needs) -> {argument: gradient}; `values` are those of `kept`,
        tensors first, then the shapes.
        """
        arguments, results, run_op, is_internal = self.arguments, self.results, self._run, self._is_internal
        names = [*arguments, "backend", *results]
        is_tensor = {*self.tensors, *results}
        pick_tensors = picker([names.index(name) for name in kept if name in is_tensor])
        pick_constants = picker([names.index(name) for name in kept if name not in is_tensor])
        pick_constant_results = picker([names.index(name) for name in results if name not in differentiable])
        pick_shaped = picker([names.index(name) for name in shapes])
        conditions = [(names.index(name), names.index(flag)) for name, flag in self._saved_if.items()]
        several = len(differentiable) > 1
        has_one_output, nothing = self._has_one_output, (None,) * (len(arguments) + 1)
        places = {name: place for place, name in enumerate(arguments)}

        def constants_and_shapes(values: tuple) -> tuple:
            found = [None if tensor is None else tensor.shape for tensor in pick_shaped(values)]
            return (*pick_constants(values), *found)

        constants_of = constants_and_shapes if shapes else pick_constants

        def to_save(values: tuple) -> tuple:
            for place, flag in conditions:
                if not values[flag]:
                    values = (*values[:place], None, *values[place + 1 :])
            return pick_tensors(values)

        to_save = to_save if conditions else pick_tensors

        def forward_and_save(ctx, *args):
            output = run_op(args[:-1], args[-1], is_internal)
            values = (*args, output) if has_one_output else (*args, *output)
            ctx.constants = constants_of(values)
            private.keep(ctx, to_save(values), pick_constant_results(values), several)
            return output

        def forward(*args):
            # Inside vmap the tensors are batched: the dispatcher unwraps them.
            return self._overload(*args) if private.in_functional_transform() else run_op(args[:-1], args[-1])

        def setup_context(ctx, inputs, output):
            inputs = inputs if len(inputs) > len(arguments) else (*inputs, AUTO)
            values = (*inputs, output) if has_one_output else (*inputs, *output)
            ctx.constants = constants_of(values)
            ctx.save_for_backward(*to_save(values))
            ctx.mark_non_differentiable(*pick_constant_results(values))
            ctx.set_materialize_grads(several)

        def run_backward(ctx, *grad_outputs):
            for grad in grad_outputs:
                if grad is not None:
                    break
            else:
                return nothing
            found = backward((*ctx.saved_tensors, *ctx.constants), grad_outputs, ctx.needs_input_grad)
            gradients = [*nothing]
            for name, gradient in found.items():
                gradients[places[name]] = gradient
            return tuple(gradients)

        eager = self._function(forward=forward_and_save, backward=run_backward)
        self._apply = private.apply_of(eager)
        self._transformable = self._function(forward=forward, setup_context=setup_context, backward=run_backward)
        self._transformable.generate_vmap_rule = True
        torch.library.register_autograd(
            f"fastseg::{self.name}", run_backward, setup_context=setup_context, lib=_definitions
        )

    def _function(self, **members: Callable) -> type[torch.autograd.Function]:
        statics = {name: staticmethod(member) for name, member in members.items()}
        return type(self.name, (torch.autograd.Function,), statics)

    def _differentiate_by_names(self, backward: Callable) -> None:
        """Makes the autograd functions of a backward whose parameters name what it needs."""
        wanted = list(inspect.signature(backward).parameters)
        kept = self._tensors_first(name for name in (*self.arguments, "backend", *self.results) if name in wanted)
        shapes = [argument for argument in self.arguments if f"shape_{argument}" in wanted]
        gradients = [f"grad_{result}" for result in self.results]
        needs = [f"needs_{argument}" for argument in self.arguments]
        saved = [*kept, *(f"shape_{argument}" for argument in shapes)]
        call = Named(backward, [*saved, *gradients, *needs], f"{self.name}.backward")

        def run(values: tuple, grad_outputs: tuple, needed: tuple) -> dict[str, Tensor | None]:
            return call.function(*call.pick((*values, *grad_outputs, *needed)))

        self._differentiate(kept, [name for name in self.results if f"grad_{name}" in wanted], run, shapes)

    def _differentiate_through_reference(self) -> None:
        """Makes the autograd functions that differentiate the reference, for every floating tensor argument."""
        kept = self._tensors_first(self.arguments)
        order = [kept.index(name) for name in self.arguments]

        def run(values: tuple, grad_outputs: tuple, needed: tuple) -> dict[str, Tensor | None]:
            args = [values[position] for position in order]
            wanted = [
                i
                for i, value in enumerate(args)
                if isinstance(value, Tensor) and value.is_floating_point() and needed[i]
            ]

            def function(*leaves):
                filled = list(args)
                for i, leaf in zip(wanted, leaves):
                    filled[i] = leaf
                return self._reference(tuple(filled))

            found = vjp(function, [args[i] for i in wanted], grad_outputs)
            return {self.arguments[i]: gradient for i, gradient in zip(wanted, found)}

        self._differentiate(kept, self.results, run)

    def _tensors_first(self, names: Iterable[str]) -> list[str]:
        is_tensor = {*self.tensors, *self.results}
        return sorted(names, key=lambda name: name not in is_tensor)


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
