"""Replaces stock modules inside somebody else's model by those of `fastseg.nn`, in place, with a report.

A replacement is a subclass of the stock class that computes the same and needs no state of its own.
Replacing a module therefore only changes its class: it remains the same object, so parameters, buffers,
hooks, train/eval mode, dtype, device, and every name and reference under which it is known stay the same.

Each `fastseg/nn/<op>.py` calls `register` for the stock class it replaces; nothing here knows any of them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn


@dataclass(frozen=True)
class Rule:
    """What to do with modules of exactly the class `stock`: see `register`."""

    stock: type[nn.Module]
    replacement: type[nn.Module] | None
    why_not: Callable[[nn.Module], str | None]


_rules: dict[type[nn.Module], Rule] = {}


def register(stock, replacement, why_not=lambda module: None):
    """Let `accelerate` replace modules of exactly the class ``stock`` by ``replacement``.

    Args:
        stock: the class to look for; subclasses are never replaced, they may compute something else.
        replacement: a subclass of ``stock`` that needs no instance attributes beyond those of ``stock``
            (class attributes give the defaults of others), or None where users should only be told why
            nothing is done.
        why_not: gives the reason to leave one particular module alone, or None.
    """
    if replacement is not None and not issubclass(replacement, stock):
        raise TypeError(f"{replacement.__qualname__} is not a subclass of {stock.__qualname__}")
    _rules[stock] = Rule(stock, replacement, why_not)


_refinements: list[Callable[[nn.Module, list[nn.Module]], dict[nn.Module, str]]] = []


def register_refinement(refine):
    """Let `accelerate` call ``refine(model, replaced)`` after the replacements: for what takes more than one
    module to decide. It may change the modules ``replaced`` and gives notes for the report, by module.
    """
    _refinements.append(refine)


@dataclass(frozen=True)
class Entry:
    """One module: every name it has in the model, its class before, and its class now or why it was left; how
    its new class was set up, if there was a choice.
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
    skipped: modules that look replaceable but were left alone, with the reason in `why`.
    unknown: number of modules of every other kind, by class name, for which there is no replacement.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    def __str__(self):
        lines = [f"fastseg.accelerate: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        entries = self.replaced + self.skipped
        names = [", ".join(entry.names) for entry in entries]
        width = max((len(name) for name in names), default=0)
        for entry, name in zip(entries, names):
            outcome = f"-> {entry.after}" if entry.after else f"skipped: {entry.why}"
            outcome += f" ({entry.note})" if entry.note else ""
            lines.append(f"  {name:<{width}}  {entry.before} {outcome}")
        if self.unknown:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.unknown.most_common())
            lines.append(f"  no replacement yet for: {kinds}")
        return "\n".join(lines)


def accelerate(model):
    """Replace the modules of ``model`` that `fastseg.nn` knows to be faster at the same result, in place.

    Only modules are seen: a call of ``torch.nn.functional.cross_entropy`` inside somebody's ``forward``
    stays as it is. Pass a module that holds network and loss to have both looked at, or the loss by itself.

    Args:
        model: any ``torch.nn.Module``; it may itself be a module that is replaced.

    Returns:
        Report: what was replaced and what was not, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastseg.accelerate: model is {type(model).__name__}; allowed: torch.nn.Module")
    names_of = {}  # keeps the order in which the model lists its modules; a module may have several names
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name or "(the model itself)")
    report = Report()
    replaced = [module for module, names in names_of.items() if _replace(module, tuple(names), report)]
    for refine in _refinements:
        notes = refine(model, replaced)
        report.replaced = [
            replace(entry, note=notes.get(module, entry.note)) for module, entry in zip(replaced, report.replaced)
        ]
    return report


def _replace(module, names, report):
    """Whether the module was replaced; `report` gets the entry."""
    before = type(module)
    rule = next((_rules[base] for base in before.__mro__ if base in _rules), None)
    why = _why_not(module, rule) if rule is not None else None
    if why is not None:
        report.skipped.append(Entry(names, before.__name__, why=why))
    elif rule is not None and rule.replacement is not None:
        module.__class__ = rule.replacement
        report.replaced.append(Entry(names, before.__name__, after=f"fastseg.nn.{rule.replacement.__name__}"))
        return True
    elif next(module.children(), None) is None:
        report.unknown[before.__name__] += 1
    return False


def _why_not(module, rule):
    """The reason to leave ``module`` as it is, or None; ``rule`` is that of its class or of a base class."""
    kind = type(module)
    if rule.replacement is not None:
        if issubclass(kind, rule.replacement):
            return "it is a fastseg module already"
        if kind is not rule.stock:
            return f"a subclass of {rule.stock.__name__} may compute something else"
        if "forward" in vars(module):
            return "its forward was replaced on this very object"
    return rule.why_not(module)
