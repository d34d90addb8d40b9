"""A progress bar on stderr: tqdm's if it is installed, else lines of text."""

import sys
from collections.abc import Iterable, Iterator, Sequence

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

LINES = 10


def progress(parts: Sequence, what: str, shown: bool) -> Iterable:
    """Iterates over `parts`, and shows the progress if `shown` and there is more than one part."""
    if not shown or len(parts) < 2:
        return parts
    return _lines(parts, what) if tqdm is None else tqdm(parts, desc=what, file=sys.stderr, leave=False)


def _lines(parts: Sequence, what: str) -> Iterator:
    for done, part in enumerate(parts, 1):
        yield part
        if done * LINES // len(parts) > (done - 1) * LINES // len(parts):
            print(f"{what}: {100 * done // len(parts)} %", file=sys.stderr)
