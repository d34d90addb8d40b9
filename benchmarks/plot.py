"""A bar chart of speedups as SVG, drawn without any plotting package."""

import math
from html import escape

from benchmarks import results

WIDTH, LEFT, RIGHT, ROW, TOP = 900, 420, 60, 24, 46
GRID = (0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def bar(group: dict[str, dict]) -> tuple[str, str, float, float | None] | None:
    """(label, best peer, speedup over it, target) of a case, under the tuned allocator where there is one."""
    record = group.get("tuned") or group["default"]
    best = results.best_peer(record, "median_ms")
    if best is None:
        return None
    wanted = [t["value"] for t in record["targets"] if t["kind"] == "speedup" and t["peer"] == "best"]
    label = f"{record['op']} {record['case']}"
    return label, best, record["contestants"][best]["ratio"], (wanted[0] if wanted else None)


def speedups(groups: list[dict[str, dict]]) -> str:
    """The chart: one bar a case on a logarithmic axis, the target as a black tick, losses (below 1) in
    red.
    """
    bars = [each for each in map(bar, groups) if each is not None]
    low, high = GRID[0], max([each[2] for each in bars] + [2.0]) * 1.2
    height = TOP + ROW * len(bars) + 12

    def x(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="16">speedup over the fastest stock PyTorch; black tick: target</text>',
    ]
    for value in (value for value in GRID if value <= high):
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{height - 8}" stroke="#ddd"/>'
            f'<text x="{x(value):.1f}" y="{TOP - 12}" text-anchor="middle" fill="#666">{value:g}x</text>'
        )
    for index, (label, best, ratio, wanted) in enumerate(bars):
        y = TOP + ROW * index
        start, end = sorted((x(1), x(ratio)))
        color = "#2a7" if ratio >= 1 else "#c33"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        width = end - start
        parts.append(f'<rect x="{start:.1f}" y="{y + 4}" width="{width:.1f}" height="15" fill="{color}"/>')
        parts.append(f'<text x="{max(end, x(1)) + 5:.1f}" y="{y + 15}">{ratio:.1f}x {escape(best)}</text>')
        if wanted is not None:
            parts.append(
                f'<line x1="{x(wanted):.1f}" x2="{x(wanted):.1f}" y1="{y + 1}" y2="{y + 22}"'
                ' stroke="black" stroke-width="2"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"
