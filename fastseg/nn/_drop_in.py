"""Shared by the drop-ins for stock modules: stock's `forward` runs where a program cannot contain ours."""

import functools
import inspect
import types

import torch
from torch import fx

from fastseg.accelerate import register


def drop_in(stock, *, own_options=(), own_none=(), **rule):
    """Class decorator for a subclass of ``stock`` with the same ``forward``: lets `fastseg.accelerate` replace
    modules of the class ``stock`` by it. The ``forward`` of ``stock`` runs

    * under ``torch.jit.trace``, under symbolic tracing by ``torch.fx`` (also torchvision's
      ``create_feature_extractor``) and under ``torch.onnx.export``,
    * in modules compiled by ``torch.jit.script``,

    so that the traced, scripted or exported model is the same as with ``stock``. If a call has an argument that
    ``stock`` does not take, or the module uses own options, ours runs there, too, and scripting fails.

    Args:
        stock: the class of ``torch.nn`` that the decorated class replaces.
        own_options: names of attributes that ``stock`` lacks and that change the result.
        own_none: names of attributes of ``stock`` that may be None only here.
        rule: other arguments of `fastseg.accelerate.register`.
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

        # TorchScript compiles the source of the wrapped function, with the globals of the wrapper.
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
    """True if a call with these arguments is recorded in a program that cannot contain ours."""
    for value in values:
        if isinstance(value, fx.Proxy):
            return True
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
