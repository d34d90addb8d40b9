"""Shows the table of networks: `python -m fastseg.models`.

`python -m fastseg.models --write docs/models.md` updates the table of that file.
"""

import sys
from functools import cache
from inspect import signature
from pathlib import Path

import torch

import fastseg.ops
from fastseg.models.registry import MODELS, Entry, build

MARKERS = "<!-- models -->\n", "<!-- /models -->"
NARROW = {"width_multiplier": 1 / 32}
SIDE = 64  # of the images for which the ops are recorded, at least


def table() -> list[dict[str, str]]:
    """One row per network of `MODELS`."""
    return [
        {
            "name": name,
            "system": entry.system,
            "class": _call(entry),
            "parameters": f"{entry.parameters:,}",
            "follows": entry.follows,
            "ops": ", ".join(ops_used(name)),
            "verified against": entry.verified,
        }
        for name, entry in MODELS.items()
    ]


def _call(entry: Entry) -> str:
    return f"{entry.network.__name__}({', '.join(f'{name}={value!r}' for name, value in entry.arguments.items())})"


@cache
def ops_used(name: str) -> tuple[str, ...]:
    """The functions of `fastseg.ops` that a training step and a prediction of the network call."""
    functions = {}
    for function in fastseg.ops.__all__:
        if not isinstance(getattr(fastseg.ops, function), type):
            functions[getattr(fastseg.ops, function).__code__] = function
    found = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code in functions:
            found.add(functions[frame.f_code])

    narrow = "width_multiplier" in signature(MODELS[name].network).parameters
    # A narrow network takes less time than the bookkeeping of one on the meta device, which computes nothing.
    with torch.device("cpu" if narrow else "meta"):
        network = build(name, **NARROW if narrow else {})
        side = max(SIDE, network.smallest_image)
        images = torch.zeros(2, network.in_channels, side, side)
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            labels = network.predict(images)
            network.loss(images, torch.zeros(labels.shape, dtype=torch.int64))
        finally:
            sys.setprofile(before)
    return tuple(function for function in fastseg.ops.__all__ if function in found)


def markdown_table() -> str:
    rows = table()
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        code = {
            "name": f"`{row['name']}`",
            "class": f"`{row['class']}`",
            "ops": f"`{row['ops'].replace(', ', '`, `')}`",
        }
        lines.append("| " + " | ".join((row | code).values()) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with a new table between the markers."""
    start, end = MARKERS
    before, _, after = text.partition(start)
    return before + start + markdown_table() + "\n" + end + after.partition(end)[2]


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        path = Path(sys.argv[2])
        path.write_text(with_table(path.read_text()))
        return
    rows = table()
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in [{column: column for column in widths}, *rows]:
        print("  ".join(row[column].ljust(width) for column, width in widths.items()).rstrip())


if __name__ == "__main__":
    main()
