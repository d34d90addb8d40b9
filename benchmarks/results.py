"""Result files: their contents and folders, and the evaluation of targets from the raw figures.

A file is `{"meta": {...}, "records": [...]}`; `benchmarks/worker.py` writes one record per case and allocator.
Committed results are in `benchmarks/results/<device>/<machine>/<op file>.json`, next to those of `benchmarks.run host`
and `sweep`, which have records of other forms.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.harness import OURS

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
UNCOMMITTED = ROOT / "build" / "benchmarks"
COMMANDS = ("host", "sweep")
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "torchvision", "pycocotools", "fastseg")


def git(*arguments: str) -> str:
    """Output of a git command in this checkout, or an empty string without git or a repository."""
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def meta(device: str, threads: int) -> dict:
    """Machine, date, software and commit of the measurement."""
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": versions(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("FASTSEG_")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        # Changes of these files do not change what is measured.
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ":!benchmarks/results")),
    }


def save(path: Path, meta: dict, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": meta, "records": records}, indent=1)
    path.write_text(text + "\n")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options on where the records of a command go, and on what is printed."""
    parser.add_argument("--targets", action="store_true", help="also say which of the project's targets are reached")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results, to be committed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records into this file")


def place(options: argparse.Namespace, meta: dict) -> Path:
    """The file or folder for the records of a command, from its options."""
    return options.json or folder(meta, RESULTS if options.save else UNCOMMITTED)


def keep(options: argparse.Namespace, name: str, meta: dict, records: list[dict]) -> None:
    """Saves the records of a command or of an op file."""
    where = place(options, meta)
    save(where if options.json else where / f"{name}.json", meta, records)


def folder(meta: dict, root: Path | None = None) -> Path:
    """The folder for the results of that machine: `cpu/intel-xeon` for "Intel(R) Xeon(R) Processor"."""
    words = re.findall("[a-z0-9]+", re.sub(r"\((r|tm)\)|processor", " ", meta["device_name"].lower()))
    return (root or RESULTS) / meta["device"] / "-".join(words)


def machines(device: str, command: str | None = None) -> list[Path]:
    """The folders of all machines with committed results of ops, or of a command."""
    return sorted(folder for folder in (RESULTS / device).glob("*") if files(folder, command))


def files(machine: Path, command: str | None = None) -> list[Path]:
    """The result files of the ops, or that of a command, in a machine's folder, sorted by name."""
    if command is not None:
        return sorted(machine.glob(f"{command}.json"))
    return [path for path in sorted(machine.glob("*.json")) if path.stem not in COMMANDS]


def load(machine: Path, command: str | None = None) -> list[tuple[dict, list[dict]]]:
    """Meta and records of every such file."""
    contents = [json.loads(path.read_text()) for path in files(machine, command)]
    return [(content["meta"], content["records"]) for content in contents]


def peers_of(record: dict) -> dict[str, dict]:
    """The contestants that are not fastseg."""
    return {name: figures for name, figures in record["contestants"].items() if not figures["ours"]}


def best_peer(record: dict, figure: str) -> str | None:
    """The peer with the smallest `figure` ("median_ms" or "extra_bytes"), or None."""
    known = {name: each[figure] for name, each in peers_of(record).items() if each[figure] is not None}
    return min(known, key=known.get) if known else None


def share_of_copy_bandwidth(record: dict) -> float:
    """Minimal bytes of the case over our time, as a share of the copy bandwidth of the same process."""
    return bytes_per_second(record, OURS) / record["copy_bytes_per_second"]


def bytes_per_second(record: dict, name: str) -> float:
    return record["minimal_bytes"] / (record["contestants"][name]["median_ms"] * 1e-3)


def judge(record: dict, target: dict) -> tuple[float | None, str | None, bool]:
    """(figure reached, the peer it refers to, whether the target is met); None, None, False if unknown."""
    contestants = record["contestants"]
    ours = contestants[OURS]
    kind, wanted = target["kind"], target["value"]
    if kind == "bandwidth":
        share = share_of_copy_bandwidth(record)
        return share, None, share >= wanted
    if kind == "extra_memory":
        extra = ours["extra_bytes"]
        return extra, None, extra is not None and extra <= wanted
    figure = "median_ms" if kind == "speedup" else "extra_bytes"
    peer = best_peer(record, figure) if target["peer"] == "best" else target["peer"]
    if peer not in contestants or ours[figure] is None or contestants[peer][figure] is None:
        return None, peer, False
    if kind == "speedup":
        reached = contestants[peer]["ratio"]
    else:
        reached = contestants[peer]["extra_bytes"] / max(ours["extra_bytes"], 1)
    return reached, peer, reached >= wanted


def judged(record: dict) -> list[tuple[dict, float | None, str | None, bool]]:
    """The results of `judge` for every target of the record's allocator."""
    mine = [target for target in record["targets"] if target["allocator"] == record["allocator"]]
    return [(target, *judge(record, target)) for target in mine]
