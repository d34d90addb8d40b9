"""What modules that take the place of a stock class share: stock's own code runs where ours cannot be written down."""

import functools
import inspect
import types

import torch
from torch import fx

from fastseg.accelerate import register


def drop_in(stock, *, own_options=(), own_none=(), **rule):
    """Class decorator for a subclass of ``stock`` with the same ``forward``: lets `fastseg.accelerate` replace
    modules of the class ``stock`` by it, and leaves a call to the ``forward`` of ``stock``

    * under ``torch.jit.trace``, under symbolic tracing by ``torch.fx`` (torchvision's ``create_feature_extractor``
      too) and under ``torch.onnx.export``,
    * as what ``torch.jit.script`` compiles,

    so that a model is traced, scripted and exported with ours in it as it was without. A call with an argument that
    ``stock`` does not take, or of a module with own options, is ours also there, and is not scripted.

    Args:
        stock: the class of ``torch.nn`` whose place the class takes.
        own_options: names of the attributes that ``stock`` lacks and that change the result.
        own_none: names of the attributes that ``stock`` has and that may be None here only.
        rule: what else `fastseg.accelerate.register` takes.
    """

    def decorate(cls):
        ours, theirs = cls.forward, stock.forward
        parameters = inspect.signature(theirs)

        def sets_own_option(module):
            changed = any(getattr(module, name) != getattr(cls, name) for name in own_options)
            return changed or any(getattr(module, name) is None for name in own_none)

        def stock_takes(module, *args, **kwargs):
            try:
                parameters.bind(module, *args, **kwargs)
            except TypeError:
                return False
            return not sets_own_option(module)

        def forward(self, *args, **kwargs):
            if is_recorded((*args, *kwargs.values())) and stock_takes(self, *args, **kwargs):
                return theirs(self, *args, **kwargs)
            return ours(self, *args, **kwargs)

        # TorchScript compiles the source of what is wrapped, and looks its names up in the globals of what wraps it.
        is_recorded = must_be_stock
        forward = types.FunctionType(forward.__code__, theirs.__globals__, "forward", None, forward.__closure__)
        functools.update_wrapper(forward, theirs)
        forward.__doc__, forward.__signature__ = ours.__doc__, inspect.signature(ours)

        def prepare_scriptable(self):
            if sets_own_option(self):
                given = ", ".join(f"{name}={getattr(self, name)!r}" for name in (*own_options, *own_none))
                raise RuntimeError(
                    f"fastseg.nn.{cls.__name__}: torch.jit.script compiles {stock.__name__}, which has no {given}; "
                    f"allowed: the default"
                )
            return self

        cls.forward, cls.__prepare_scriptable__ = forward, prepare_scriptable
        register(stock, cls, **rule)
        return cls

    return decorate


def must_be_stock(values) -> bool:
    """Whether a call with these arguments is written down as a program, in which ours cannot stand."""
    for value in values:
        if isinstance(value, fx.Proxy):
            return True
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
