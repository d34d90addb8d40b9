"""Replaces stock modules of a model by those of `fastseg.nn`, in place, with a report and an undo.

A replacement is a subclass of the stock class that computes the same and needs no state of its own.
Replacing a module therefore only changes its class: it remains the same object, so parameters, buffers,
hooks, train/eval mode, dtype, device, and all its names and references stay the same. The model is never run.

Each `fastseg/nn/<op>.py` registers its replacements; this file names none of them.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

_MARK = "_accelerated"  # set on a module whose class was changed; modules that the user built as fastseg.nn.* lack it
_lock = threading.Lock()


@dataclass(frozen=True)
class Rule:
    """What to do with modules of exactly the class `stock`: see `register`."""

    stock: type[nn.Module]
    replacement: type[nn.Module] | None
    why_not: Callable[[nn.Module], str | None]
    note: Callable[[nn.Module], str | None]
    concerns: Callable[[nn.Module], bool]


_rules: dict[type[nn.Module], Rule] = {}


def register(stock, replacement, why_not=lambda module: None, note=lambda module: None, concerns=lambda module: True):
    """Let `accelerate` replace modules of exactly the class ``stock`` by ``replacement``.

    Args:
        stock: the class to look for; subclasses are never replaced, they may compute something else.
        replacement: a subclass of ``stock`` that needs no instance attributes beyond those of ``stock``
            (class attributes give the defaults of others), or None if the report should only say why the
            module is not replaced.
        why_not: returns the reason not to replace a particular module, or None.
        note: says how a module will work after its replacement, if there is a choice, or None.
        concerns: False for modules that users do not expect to be replaced: the report omits them.
    """
    if replacement is not None and not issubclass(replacement, stock):
        raise TypeError(f"{replacement.__qualname__} is not a subclass of {stock.__qualname__}")
    _rules[stock] = Rule(stock, replacement, why_not, note, concerns)


@dataclass(frozen=True)
class Entry:
    """One module: all its names in the model, its class before, its class now or why it was skipped, and how its
    new class works, if there is a choice.
    """

    names: tuple[str, ...]
    before: str
    after: str | None = None
    why: str | None = None
    note: str | None = None


@dataclass
class Report:
    """What `accelerate` did; prints as a table.

    replaced: modules whose class was changed.
    skipped: modules that look replaceable but were not replaced, with the reason in `why`.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self):
        """Give every replaced module its old class. Modules that `fastseg.restore` has restored stay so."""
        with _lock:
            for module in self._modules:
                _restore(module)

    def __str__(self):
        lines = [f"fastseg.accelerate: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        entries = self.replaced + self.skipped
        names = [", ".join(entry.names) for entry in entries]
        width = max((len(name) for name in names), default=0)
        for entry, name in zip(entries, names):
            outcome = f"-> {entry.after}" if entry.after else f"skipped: {entry.why}"
            outcome += f" ({entry.note})" if entry.note else ""
            lines.append(f"  {name:<{width}}  {entry.before} {outcome}")
        return "\n".join(lines)


def accelerate(model):
    """Replace the modules of ``model`` for which `fastseg.nn` has a faster one with the same result, in place.

    Only modules are replaced: a call of ``torch.nn.functional.cross_entropy`` inside a ``forward`` stays.
    Pass a module that contains network and loss to replace modules in both, or call this on the loss, too.
    The model is not run, no random numbers are drawn, and any thread may call this at any time. Wrapped models
    (DDP, ``torch.compile``) can be passed; so can a part of a model.

    A pooling that returns indices then returns `fastseg.ops.PoolIndices` of one byte each. Everything but an
    unpooling of fastseg uses them as torch's int64 tensor.

    If a model is scripted, traced (``torch.jit``, ``torch.fx``) or exported to ONNX, its modules run stock's code.
    A program of ``torch.export`` contains ops of fastseg: ``import fastseg`` before ``torch.export.load``. For a
    program of stock ops alone, call `restore` before the export.

    Args:
        model: any ``torch.nn.Module``; it may itself be a module that is replaced.

    Returns:
        Report: what was replaced and what was not, and why; ``print`` it. Its ``undo()`` reverts all replacements.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    names_of = {}  # keeps the order in which the model lists its modules; a module may have several names
    for name, module in _named_modules("accelerate", model):
        names_of.setdefault(module, []).append(name or "(the model itself)")
    report = Report()
    with _lock:
        for module, names in names_of.items():
            _replace(module, tuple(names), report)
    return report


def restore(model):
    """Give every module of ``model`` that `accelerate` replaced its old class, in place.

    The model then computes bitwise the same as before. This also works on a copy of the model given to `accelerate`,
    and after pickling. Modules that were built as ``fastseg.nn.*`` stay.

    Args:
        model: any ``torch.nn.Module``.

    Returns:
        int: how many modules were restored.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    modules = dict.fromkeys(module for _, module in _named_modules("restore", model))
    with _lock:
        return sum(map(_restore, modules))


def _named_modules(function, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseg.{function}: model is {type(model).__name__}; allowed: torch.nn.Module")
    return list(model.named_modules(remove_duplicate=False))


def _replace(module, names, report):
    before = type(module)
    rule = next((_rules[base] for base in before.__mro__ if base in _rules), None)
    if rule is None or not rule.concerns(module):
        return
    why = _why_not(module, rule)
    if why is not None:
        report.skipped.append(Entry(names, before.__name__, why=why))
    elif rule.replacement is not None:
        module.__class__ = rule.replacement
        setattr(module, _MARK, True)
        after = f"fastseg.nn.{rule.replacement.__name__}"
        report.replaced.append(Entry(names, before.__name__, after=after, note=rule.note(module)))
        report._modules.append(module)


def _restore(module):
    """Returns True if the module had been replaced."""
    if _MARK not in vars(module):
        return False
    delattr(module, _MARK)
    module.__class__ = next(rule.stock for rule in _rules.values() if rule.replacement is type(module))
    return True


def _why_not(module, rule):
    """The reason not to replace ``module``, or None; ``rule`` is that of its class or of a base class."""
    kind = type(module)
    if rule.replacement is not None:
        if issubclass(kind, rule.replacement):
            return "it is a fastseg module already"
        if kind is not rule.stock:
            return f"a subclass of {rule.stock.__name__} may compute something else"
        if "forward" in vars(module):
            return "its forward was replaced on this very object"
    return rule.why_not(module)
