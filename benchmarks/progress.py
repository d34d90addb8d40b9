"""A progress bar, if tqdm is installed."""

from collections.abc import Iterable

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def progress(items: Iterable, unit: str = "call") -> Iterable:
    return items if tqdm is None else tqdm(items, unit=unit, leave=False)
