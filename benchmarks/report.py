"""`python -m benchmarks.report`: write the committed results into the Markdown files, between their markers.

`<!-- benchmarks:cpu -->` ... `<!-- /benchmarks:cpu -->` is filled with one row for each case that has a
target; `<!-- benchmarks:cpu:all -->` with every case, allocator and peer; `:host` and `:sweep` with the results of
those commands; machine by machine. `--check` writes nothing and fails if a file differs from what would be written. A
plot is drawn beside each machine's results (`benchmarks/results/<device>/<machine>/speedup.svg`).
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import host, plot, results, sweep, table
from benchmarks.harness import OURS

FILES = ("README.md", "benchmarks/README.md")
DEVICES = ("cpu", "cuda")
MARKER = re.compile(
    r"(?P<open><!-- benchmarks:(?P<name>(?P<device>cpu|cuda)(?::(?P<kind>all|host|sweep))?) -->\n).*?"
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
    """Where and when: machine, software and day, and the commits that were measured there."""
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


def summary_row(group: dict[str, dict]) -> list[str]:
    default, tuned = group.get("default"), group.get("tuned")
    record = tuned or default
    best = results.best_peer(record, "median_ms")
    smallest = results.best_peer(default or record, "extra_bytes")
    memory = (default or record)["contestants"]
    return [
        workload(record),
        " / ".join(time_of(each, OURS) for each in (default, tuned) if each),
        " / ".join(time_of(each, "eager") for each in (default, tuned) if each),
        f"{time_of(record, best)} {best}" if best else "–",
        speedup(record, best),
        f"{results.share_of_copy_bandwidth(record):.0%}",
        table.megabytes(memory[OURS]["extra_bytes"]),
        table.megabytes(memory[smallest]["extra_bytes"]) if smallest else "–",
        "; ".join(cell for cell in map(target_cell, group.values()) if cell),
    ]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def summary(machine: Path) -> str:
    groups = [group for group in pairs(machine) if any(record["targets"] for record in group.values())]
    allocators = " default / tuned" if machine.parent.name == "cpu" else ""
    header = [
        "workload", f"fastseg ms{allocators}", f"eager ms{allocators}", "best stock ms", "speedup over best",
        "of copy bandwidth", "extra memory", "least extra of stock", "targets",
    ]
    return f"{caption(machine)}\n\n{markdown(header, [summary_row(group) for group in groups])}\n"


def peer_cells(record: dict) -> str:
    peers = [
        f"{name} {table.milliseconds(figures['median_ms'])} ({figures['ratio']:.2f}x)"
        for name, figures in record["contestants"].items() if name != OURS
    ]
    return ", ".join(peers)


def full_row(record: dict) -> list[str]:
    ours = record["contestants"][OURS]
    rate = results.bytes_per_second(record, OURS) * 1e-9
    best = results.best_peer(record, "median_ms")
    lost = best is not None and record["contestants"][best]["ratio"] < 1
    return [
        workload(record), record["allocator"], table.milliseconds(ours["median_ms"]),
        f"{rate:.1f} ({results.share_of_copy_bandwidth(record):.0%})", table.megabytes(ours["extra_bytes"]),
        ("**lost** " if lost else "") + peer_cells(record),
    ]


def full(machine: Path) -> str:
    records = [record for group in pairs(machine) for record in group.values()]
    header = [
        "workload", "allocator", "fastseg ms", "GB/s of minimal bytes (of copy)", "extra memory",
        "peers: ms (their time / ours)",
    ]
    return f"{caption(machine)}\n\n{markdown(header, [full_row(record) for record in records])}\n"


def of_command(machine: Path, command: str) -> str:
    """What `benchmarks.run host` or `sweep` found."""
    module = {"host": host, "sweep": sweep}[command]
    ((_, records),) = results.load(machine, command)
    tables = [markdown(header, rows) for header, rows in module.tables(records)]
    return "\n\n".join([caption(machine, command), *tables, module.verdict(records)]) + "\n"


def filled(text: str) -> str:
    """The text with everything between benchmark markers generated afresh."""

    def replacement(match: re.Match) -> str:
        device, kind = match["device"], match["kind"]
        if kind in results.COMMANDS:
            tables = [of_command(machine, kind) for machine in results.machines(device, kind)]
        else:
            tables = [(full if kind == "all" else summary)(machine) for machine in results.machines(device)]
        return match["open"] + ("\n".join(tables) or "Not yet measured.\n") + match["close"]

    return MARKER.sub(replacement, text)


def outdated(root: Path = results.ROOT) -> dict[Path, str]:
    """Every file that differs from what the committed results say, with its right contents."""
    wanted = {}
    for path in (root / name for name in FILES):
        if path.exists():
            wanted[path] = filled(path.read_text())
    for machine in (machine for device in DEVICES for machine in results.machines(device)):
        wanted[machine / "speedup.svg"] = plot.speedups(pairs(machine))
    return {path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if something is outdated")
    options = parser.parse_args(arguments)
    files = outdated()
    for path, text in files.items():
        print(f"{'out of date' if options.check else 'wrote'}: {path.relative_to(results.ROOT)}")
        if not options.check:
            path.write_text(text)
    return 1 if options.check and files else 0


if __name__ == "__main__":
    sys.exit(main())
