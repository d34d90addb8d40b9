"""`python -m benchmarks.exercise [op ...]`: run the check of every case once at its small size, untimed.

`make gpu-check` runs this under compute-sanitizer: every op, forward and backward, in one short process.
"""

import argparse
import sys

import torch

from benchmarks import harness


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exercise", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="files of benchmarks/ops (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    failures = 0
    for op in options.ops or harness.op_names():
        for case in (case.quick() for case in harness.cases_of(op) if options.device in case.devices):
            torch.manual_seed(0)
            inputs = case.make(case.shape, torch.device(options.device), case.dtype, case.layout)
            wrong = harness.check(case, inputs)
            failures += wrong is not None
            print(f"{case.title}: {wrong or 'right'}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
