"""Text of records and targets, for the terminal and for the generated Markdown."""

from benchmarks import results
from benchmarks.harness import OURS


def megabytes(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e6:.1f} MB"


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def heading(meta: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    commit = (meta["commit"][:10] or "no commit") + (" with local changes" if meta["dirty"] else "")
    return f"{meta['device_name']}, {meta['threads']} threads; {packages}; {commit}; {meta['date']}"


def columns(header: list[str], rows: list[list[str]]) -> str:
    """A table for the terminal; the first column is left-aligned."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]) for first, *others in lines
    )


def report(tables: list[tuple[list[str], list[list[str]]]], verdict: str) -> str:
    """The tables of a command and its verdict."""
    return "\n\n".join([*(columns(header, rows) for header, rows in tables), verdict])


def text(record: dict, targets: bool) -> str:
    """Lines for ours, every peer, and, with `targets`, every target."""
    ours = record["contestants"][OURS]
    passes = "forward + backward" if record["backward"] else "forward"
    lines = [f"{record['op']} {record['case']}, {passes}, {record['allocator']} allocator"]
    for name, figures in record["contestants"].items():
        rate = results.bytes_per_second(record, name) * 1e-9
        share = rate * 1e9 / record["copy_bytes_per_second"]
        flops = record["flops"]
        line = f"  {name:22} {figures['median_ms']:10.3f} ms"
        if name == OURS:
            line += f"  {'':22}"
        else:
            low, high = figures["ratio_quartiles"]
            line += f"  x{figures['ratio']:<6.2f} ({low:.2f} to {high:.2f})".ljust(24)
        line += f" {rate:7.1f} GB/s {share:5.0%} of copy  +{megabytes(figures['extra_bytes'])}"
        line += f"  {flops / figures['median_ms'] * 1e-6:.0f} GFLOP/s" if flops else ""
        lines.append(line + ("" if figures["reliable"] else "  (disturbed: few clean samples)"))
    if "reference" in record["backends"].values():
        lines.append("  fastseg ran on its plain-PyTorch reference: no kernel took this call")
    for name, reason in record["skipped_peers"].items():
        lines.append(f"  {name:22} not run: {reason}")
    best = results.best_peer(record, "median_ms")
    if best is not None and record["contestants"][best]["median_ms"] < ours["median_ms"]:
        lines.append(f"  LOST to {best}")
    if targets:
        lines += [f"  target {line}" for line in target_lines(record)]
    return "\n".join(lines)


def target_words(target: dict, peer: str | None) -> str:
    """The target as text."""
    against = f"best ({peer})" if target["peer"] == "best" else target["peer"]
    value = target["value"]
    return {
        "speedup": f">= {value:g}x {against}, {target['allocator']} allocator",
        "extra_memory": f"extra memory <= {megabytes(value)}",
        "memory_ratio": f">= {value:g}x less extra memory than {against}",
        "bandwidth": f">= {value:.0%} of copy bandwidth",
    }[target["kind"]]


def reached_words(target: dict, reached: float | None) -> str:
    """The figure reached as text."""
    if reached is None:
        return "not measured"
    if target["kind"] == "extra_memory":
        return megabytes(reached)
    return f"{reached:.0%}" if target["kind"] == "bandwidth" else f"{reached:.2f}x"


def target_lines(record: dict) -> list[str]:
    return [
        f"{target_words(target, peer)}: {reached_words(target, reached)}, {'reached' if met else 'MISSED'}"
        for target, reached, peer, met in results.judged(record)
    ]


def targets(records: list[dict]) -> str:
    """The summary of every target of every record."""
    lines = [f"{record['op']} {record['case']}: {line}" for record in records for line in target_lines(record)]
    if not lines:
        return "No target belongs to these cases."
    missed = sum("MISSED" in line for line in lines)
    return f"Targets: {len(lines) - missed} reached, {missed} missed\n  " + "\n  ".join(lines)
