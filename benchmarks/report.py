"""`python -m benchmarks.report`: write the committed results into README.md and docs/benchmarks.md, and draw them.

It writes between `<!-- benchmarks:cpu:KIND -->` and `<!-- /benchmarks:cpu:KIND -->` (or `cuda`). Kinds: `headline`,
some cases for the README, each as measured last; `all`, every case, allocator and peer, machine by machine; `targets`,
the targets of some cases; `host` and `sweep`, the results of those commands. Charts go to `docs/images`. `--check`
writes nothing and fails if a file is not up to date; it needs no matplotlib, which draws the charts.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import charts, host, results, sweep, table
from benchmarks.harness import OURS

FILES = ("README.md", "docs/benchmarks.md")
IMAGES = results.ROOT / "docs" / "images"
DEVICES = ("cpu", "cuda")
HEADLINES = (
    "cross_entropy 2x19x512x1024 float32",
    "upsample_cross_entropy_dice x8 2x150x512x512 float32",
    "max_unpool2d 4x64x360x480 float32",
    "convolution ASPP rate 36 1x2048x65x65 float32 channels_last",
    "roi_align 7x7 1x256x200x336 float32",
    "mask_nms 1000x480x640 bool",
)
MARKER = re.compile(
    r"(?P<open><!-- benchmarks:(?P<name>(?P<device>cpu|cuda):(?P<kind>headline|all|targets|host|sweep)) -->\n).*?"
    r"(?P<close><!-- /benchmarks:(?P=name) -->)",
    re.DOTALL,
)


def pairs(machine: Path) -> list[dict[str, dict]]:
    """The records of a machine grouped by case: allocator -> record."""
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for _, records in results.load(machine):
        for record in records:
            groups.setdefault((record["op"], record["case"]), {})[record["allocator"]] = record
    return list(groups.values())


def caption(machine: Path, command: str | None = None) -> str:
    """Machine, software, day and commits of the measurements."""
    commits: dict[str, list[str]] = {}
    for meta, _ in results.load(machine, command):
        others = {name: version for name, version in meta["versions"].items() if name != "fastseg"}
        packages = ", ".join(f"{name} {version}" for name, version in others.items())
        place = f"{meta['device_name']}, {meta['threads']} threads, {packages}, {meta['date'][:10]}"
        commit = meta["commit"][:10] + (" with local changes" if meta["dirty"] else "")
        known = commits.setdefault(place, [])
        known += [commit] if commit not in known else []
    return "Measured on " + "; ".join(f"{place} (commit {', '.join(known)})" for place, known in commits.items()) + "."


def workload(record: dict) -> str:
    notes = [] if record["backward"] else ["forward"]
    notes += ["on the plain-PyTorch reference"] if "reference" in record["backends"].values() else []
    return ", ".join([f"`{record['op']}` {record['case']}", *notes])


def time_of(record: dict | None, name: str) -> str:
    if record is None or name not in record["contestants"]:
        return "–"
    return table.milliseconds(record["contestants"][name]["median_ms"])


def speedup(record: dict | None, name: str | None) -> str:
    if record is None or name not in record["contestants"]:
        return "–"
    return f"{record['contestants'][name]['ratio']:.1f}x"


def target_cell(record: dict) -> str:
    """Every target of a record, the missed ones in bold."""
    cells = []
    for target, reached, peer, met in results.judged(record):
        words = f"{table.target_words(target, peer)}: {table.reached_words(target, reached)}"
        cells.append(words if met else f"**missed** {words}")
    return "; ".join(cells)


def latest(device: str) -> dict[str, tuple[dict, dict[str, dict]]]:
    """By title: meta and records (by allocator) of every case, from the machine that measured it last."""
    found: dict[str, tuple[dict, dict[str, dict]]] = {}
    for machine in results.machines(device):
        for meta, records in results.load(machine):
            for record in records:
                title = f"{record['op']} {record['case']}"
                known, group = found.get(title, (meta, {}))
                if meta["date"] > known["date"]:
                    known, group = meta, {}
                if meta["date"] == known["date"]:
                    found[title] = known, group | {record["allocator"]: record}
    return found


def headline_rows(device: str) -> Iterator[list[str]]:
    known = latest(device)
    for title in HEADLINES:
        if title not in known:
            continue
        meta, group = known[title]
        record, first = charts.of_one_allocator(group), group.get("default", group.get("tuned"))
        best, smallest = results.best_peer(record, "median_ms"), results.best_peer(first, "extra_bytes")
        yield [
            workload(record),
            meta["device_name"],
            time_of(record, OURS),
            f"{time_of(record, best)} ({best})",
            speedup(record, best),
            f"{table.megabytes(first['contestants'][OURS]['extra_bytes'])} / "
            f"{table.megabytes(first['contestants'][smallest]['extra_bytes'])}",
        ]


def losses(device: str) -> str:
    """One sentence on the cases in which a peer is faster."""
    lost = {}
    known = latest(device)
    for title, (_, group) in known.items():
        record = charts.of_one_allocator(group)
        best = results.best_peer(record, "median_ms")
        if best is not None and record["contestants"][best]["ratio"] < 1:
            lost[title] = record["contestants"][best]["ratio"]
    worst = ", ".join(f"`{title}` ({lost[title]:.2f}x)" for title in sorted(lost, key=lost.get)[:3])
    words = f"Slower than the fastest peer in {len(lost)} of {len(known)} cases"
    return f"{words}, most so in {worst}." if lost else f"{words}."


def headline(device: str) -> str:
    rows = list(headline_rows(device))
    if not rows:
        return ""
    header = ["workload", "device", "fastseg ms", "best stock ms", "speedup", "extra memory, ours / least of stock"]
    return f"{markdown(header, rows)}\n\n{losses(device)}\n"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def target_table(machine: Path) -> str:
    rows = [
        [workload(record), record["allocator"], target_cell(record)]
        for group in pairs(machine)
        for record in group.values()
        if results.judged(record)
    ]
    return f"{caption(machine)}\n\n{markdown(['workload', 'allocator', 'targets'], rows)}\n" if rows else ""


def peer_cells(record: dict) -> str:
    peers = [
        f"{name} {table.milliseconds(figures['median_ms'])} ({figures['ratio']:.2f}x)"
        for name, figures in record["contestants"].items()
        if name != OURS
    ]
    return ", ".join(peers)


def full_row(record: dict) -> list[str]:
    ours = record["contestants"][OURS]
    rate = results.bytes_per_second(record, OURS) * 1e-9
    best = results.best_peer(record, "median_ms")
    lost = best is not None and record["contestants"][best]["ratio"] < 1
    return [
        workload(record),
        record["allocator"],
        table.milliseconds(ours["median_ms"]),
        f"{rate:.1f} ({results.share_of_copy_bandwidth(record):.0%})",
        table.megabytes(ours["extra_bytes"]),
        ("**lost** " if lost else "") + peer_cells(record),
    ]


def full(machine: Path) -> str:
    records = [record for group in pairs(machine) for record in group.values()]
    header = [
        "workload",
        "allocator",
        "fastseg ms",
        "GB/s of minimal bytes (of copy)",
        "extra memory",
        "peers: ms (their time / ours)",
    ]
    return f"{caption(machine)}\n\n{markdown(header, [full_row(record) for record in records])}\n"


def of_command(machine: Path, command: str) -> str:
    """The results of `benchmarks.run host` or `sweep`."""
    module = {"host": host, "sweep": sweep}[command]
    ((_, records),) = results.load(machine, command)
    tables = [markdown(header, rows) for header, rows in module.tables(records, targets=True)]
    return "\n\n".join([caption(machine, command), *tables, module.verdict(records, targets=True)]) + "\n"


def filled(text: str) -> str:
    """The text with everything between benchmark markers generated again."""

    def replacement(match: re.Match) -> str:
        device, kind = match["device"], match["kind"]
        if kind == "headline":
            tables = [headline(device)]
        elif kind in results.COMMANDS:
            tables = [of_command(machine, kind) for machine in results.machines(device, kind)]
        else:
            tables = [{"all": full, "targets": target_table}[kind](machine) for machine in results.machines(device)]
        return match["open"] + ("\n".join(filter(None, tables)) or "Not yet measured.\n") + match["close"]

    return MARKER.sub(replacement, text)


def drawings() -> dict[Path, charts.Chart]:
    """Every chart by its file: one with the newest results of each op, and three for each machine."""
    found = {}
    for device in DEVICES:
        groups = [group for _, group in latest(device).values()]
        if groups:
            found[IMAGES / f"{device}-speedup.svg"] = charts.speedups(charts.first_of_each_op(groups))
        for machine in results.machines(device):
            for name, draw in charts.OF_A_MACHINE.items():
                found[IMAGES / f"{device}-{machine.name}-{name}.svg"] = draw(pairs(machine))
    return found


def outdated(root: Path = results.ROOT) -> list[Path]:
    """Every text and chart that does not match the committed results."""
    texts = [path for path in (root / name for name in FILES) if path.read_text() != filled(path.read_text())]
    return texts + [path for path, chart in drawings().items() if not chart.is_drawn_in(path)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is outdated")
    options = parser.parse_args(arguments)
    files = outdated()
    for path in files:
        print(f"{'out of date' if options.check else 'writing'}: {path.relative_to(results.ROOT)}")
        if options.check:
            continue
        if path.suffix == ".svg":
            drawings()[path].draw(path)
        else:
            path.write_text(filled(path.read_text()))
    return 1 if options.check and files else 0


if __name__ == "__main__":
    sys.exit(main())
