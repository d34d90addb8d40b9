"""A progress bar on stderr, of tqdm where it is installed, else in lines."""

import sys
from collections.abc import Iterable, Iterator, Sequence

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

LINES = 10


def progress(parts: Sequence, what: str, shown: bool) -> Iterable:
    """Goes through `parts`, and shows how far it has come if that is wanted and takes more than one step."""
    if not shown or len(parts) < 2:
        return parts
    return _lines(parts, what) if tqdm is None else tqdm(parts, desc=what, file=sys.stderr, leave=False)


def _lines(parts: Sequence, what: str) -> Iterator:
    for done, part in enumerate(parts, 1):
        yield part
        if done * LINES // len(parts) > (done - 1) * LINES // len(parts):
            print(f"{what}: {100 * done // len(parts)} %", file=sys.stderr)
