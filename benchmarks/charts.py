"""Charts of results as SVG files, by matplotlib. Each file ends with a digest of its data, so that `--check` can tell
without drawing whether it is up to date.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.harness import OURS

GREEN, RED, GREY = "#2a9d6f", "#c8383c", "#b8bec8"
Group = dict[str, dict]  # the records of a case by allocator


@dataclass(frozen=True)
class Chart:
    """The data of a chart, and the function that draws it on matplotlib axes."""

    data: list
    plot: Callable
    size: tuple[float, float]  # inches

    @property
    def digest(self) -> str:
        shown = json.dumps([self.plot.__name__, self.data, self.size])
        return f"<!-- shows {hashlib.sha256(shown.encode()).hexdigest()} -->"

    def is_drawn_in(self, path: Path) -> bool:
        return path.exists() and path.read_text().rstrip().endswith(self.digest)

    def draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fastseg", "font.size": 9}
        figure, axes = pyplot.subplots(figsize=self.size, layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        self.plot(axes, self.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        path.write_text(f"{path.read_text().rstrip()}\n{self.digest}\n")


def of_one_allocator(group: Group) -> dict:
    return group.get("tuned") or group["default"]


def title_of(record: dict) -> str:
    return f"{record['op']} {record['case']}" + ("" if record["backward"] else ", forward")


def first_of_each_op(groups: list[Group]) -> list[Group]:
    found = {}
    for group in groups:
        found.setdefault(of_one_allocator(group)["op"], group)
    return list(found.values())


def speedups(groups: list[Group]) -> Chart:
    """One bar per case: the fastest peer's time / ours."""
    bars = []
    for record in map(of_one_allocator, groups):
        best = results.best_peer(record, "median_ms")
        if best is not None:
            bars.append([title_of(record), best, round(record["contestants"][best]["ratio"], 2)])
    return Chart(bars, plot_speedups, (9.5, 0.9 + 0.2 * len(bars)))


def plot_speedups(axes, bars):
    ratios = [ratio for _, _, ratio in bars]
    colours = [GREEN if ratio >= 1 else RED for ratio in ratios]
    axes.barh(range(len(bars)), [ratio - 1 for ratio in ratios], left=1, color=colours)
    for row, (_, best, ratio) in enumerate(bars):
        axes.annotate(f"{ratio:.1f}x {best}", (max(ratio, 1), row), (4, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", xlabel="speed-up over the fastest other implementation")
    axes.set_xlim(min([0.5, *ratios]) * 0.9, max(ratios) * 4)  # room for the labels
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    label_rows(axes, [title for title, _, _ in bars])


def memory(groups: list[Group]) -> Chart:
    """Two bars per case: the least extra memory of a peer, and ours."""
    bars = []
    for record in (group.get("default") or group["tuned"] for group in groups):
        best = results.best_peer(record, "extra_bytes")
        ours = record["contestants"][OURS]["extra_bytes"]
        if best is not None and ours is not None:
            peak = record["contestants"][best]["extra_bytes"]
            bars.append([title_of(record), best, round(ours / 1e6, 2), round(peak / 1e6, 2)])
    return Chart(bars, plot_memory, (9.5, 0.9 + 0.26 * len(bars)))


def plot_memory(axes, bars):
    _, _, ours, peaks = zip(*bars)
    axes.barh([row - 0.2 for row in range(len(bars))], ours, 0.4, color=GREEN, label="fastseg")
    axes.barh([row + 0.2 for row in range(len(bars))], peaks, 0.4, color=GREY, label="least of the others")
    axes.set(xscale="symlog", xlabel="peak extra memory, MB")
    axes.legend(loc="upper right")
    label_rows(axes, [title for title, _, _, _ in bars])


def label_rows(axes, titles):
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def roofline(groups: list[Group]) -> Chart:
    """One dot per case: our time against the time of a copy of its minimal bytes."""
    dots = []
    for record in map(of_one_allocator, groups):
        floor = record["minimal_bytes"] / record["copy_bytes_per_second"] * 1e3
        dots.append([record["op"], round(floor, 4), round(record["contestants"][OURS]["median_ms"], 4)])
    return Chart(dots, plot_roofline, (7.5, 5.5))


def plot_roofline(axes, dots):
    from matplotlib import colormaps

    ops, colours = sorted({op for op, _, _ in dots}), colormaps["tab20"]
    for place, op in enumerate(ops):
        x, y = zip(*[(floor, time) for name, floor, time in dots if name == op])
        axes.scatter(x, y, s=22, color=colours(place % 20), marker="os^D"[place // 20 % 4], label=op)
    ends = min(floor for _, floor, _ in dots) / 2, max(time for _, _, time in dots) * 2
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.annotate("the memory bus", (ends[0], ends[0]), (30, 14), textcoords="offset points", ha="left")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="ms for the minimal bytes at copy bandwidth", ylabel="ms of fastseg")
    axes.legend(fontsize=7, ncols=2, frameon=False, loc="lower right")
    axes.grid(alpha=0.3)


OF_A_MACHINE = {"speedup": speedups, "memory": memory, "roofline": roofline}
