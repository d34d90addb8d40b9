"""`python -m benchmarks.tune_convolution [table ...]`: times block sizes of the Triton convolutions, rewrites tables.

For every row of a table (dense, weight, depthwise, depthwise_weight) it times each candidate that fits, on the shapes
of that row, and writes the one with the smallest total into the source. Needs a GPU; `--dry-run` only prints. Run
tests/test_triton_aot.py afterwards: it checks limits of every row, such as no spills.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from fastseg._triton import MAX_SHARED
from fastseg.kernels.convolution.launch import LARGE_SHARED

KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "convolution"
TABLES = {  # name: (module in kernels/convolution, table in it)
    "dense": ("triton", "CONFIGS"),
    "weight": ("triton_weight", "CONFIGS"),
    "depthwise": ("triton_depthwise", "CONFIGS"),
    "depthwise_weight": ("triton_depthwise", "WEIGHT_CONFIGS"),
}
RATES = (2, 12, 24)
OUTPUTS = {"few": 21, "medium": 64, "wide": 256, "widest": 512}


def shapes(table: str, key: tuple) -> list[tuple]:
    """(batch, channels, outputs, size, rate) of the calls for which the row `key` is used."""
    if table.startswith("depthwise"):
        small = key[1] is not None
        return [(8, 256, 256, 16 if small else size, rate) for size in (65, 64) for rate in (2, 12)]
    channels = 2048 if key[0] == "half" else 512
    return [(8, channels, OUTPUTS[key[2]], size, rate) for size in (65, 64) for rate in RATES]


def candidates(table: str, key: tuple, config: type) -> Iterator[tuple]:
    if table == "depthwise":
        pixels, channels = ((256, 512, 1024, 2048), (1, 4)) if key[0] == "planes" else ((8, 16, 32, 64), (32, 64, 128))
        yield from (config(*values) for values in product(pixels, channels, (4, 8)))
        return
    if table == "depthwise_weight":
        pixels, channels = ((128, 256, 512), (1, 2)) if key[0] == "planes" else ((4, 8, 16), (32, 64))
        yield from (config(*values) for values in product(pixels, channels, (4, 8)))
        return
    size = 2 if key[0] == "half" else 4
    outputs = {"few": (16, 32), "medium": (64,), "wide": (64, 128), "widest": (256,)}[key[2]]
    most = LARGE_SHARED if key[2] == "widest" else MAX_SHARED
    for other, own, depth, warps, stages in product((64, 128, 256), outputs, (16, 32, 64, 128), (4, 8), (2, 3, 4, 5)):
        if (other + own) * depth * size * stages <= most and other * own <= 128 * 32 * warps:
            first, second = (other, own) if table == "dense" or key[2] == "widest" else (own, other)
            yield config(first, second, depth, warps, stages)


def call(table: str, key: tuple, shape: tuple) -> Callable[[], None]:
    """One call of the kernel, as its launcher makes it."""
    from fastseg.kernels.convolution import triton as dense
    from fastseg.kernels.convolution import triton_depthwise, triton_weight

    batch, channels, outputs, size, rate = shape
    dtype = torch.float32 if key[0] in ("tf32", "ieee") else torch.bfloat16
    layout = torch.channels_last if "channels_last" in key else torch.contiguous_format
    image, grad = (
        torch.randn(batch, count, size, size, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        for count in (channels, outputs)
    )
    weight = torch.randn(outputs, 1 if table.startswith("depthwise") else channels, 3, 3, device="cuda", dtype=dtype)
    windows = [1, 1], [rate, rate], [rate, rate]
    if table == "dense":
        return lambda: dense.dilated_conv2d(image, weight, None, None, *windows, 1, [size, size], False, grad)
    if table == "weight":
        return lambda: triton_weight.conv2d_grad_weight(image, grad, *windows, 1, [3, 3], weight)
    if table == "depthwise":
        return lambda: triton_depthwise.dilated_conv2d(image, weight, None, None, *windows, [size, size], False, grad)
    return lambda: triton_depthwise.conv2d_grad_weight(image, grad, *windows, [3, 3], weight)


def best(table: str, key: tuple, module, calls: list[Callable]) -> tuple[float, tuple]:
    """(milliseconds over all calls, configuration); the present one if no other is faster."""
    from triton.testing import do_bench

    found = []
    for config in (getattr(module, TABLES[table][1])[key], *candidates(table, key, module.Config)):
        choose, module.config_of = module.config_of, lambda *arguments, config=config: config
        try:
            found.append((sum(do_bench(run) for run in calls), config))
        except Exception as error:  # too much shared memory or too many registers for this GPU
            print(f"  {config}: {error}", file=sys.stderr)
        finally:
            module.config_of = choose
    return min(found)


def rewritten(text: str, table: str, key: tuple, config: tuple) -> str:
    """`text`, the source of a module, with `config` as the configuration at `key` of the table."""
    start = text.index(f"{TABLES[table][1]} = {{")
    row = re.escape("(" + ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key) + ")")
    values = ", ".join(map(str, config))
    changed, count = re.subn(row + r": Config\([\d, ]+\)", lambda found: re.sub(
        r"Config\(.*\)", f"Config({values})", found[0]), text[start:], count=1)  # fmt: skip
    if not count:
        raise ValueError(f"{table}: no row {key}")
    return text[:start] + changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, change no file")
    options = parser.parse_args(arguments)
    unknown = set(options.table) - set(TABLES)
    if unknown:
        parser.error(f"table {', '.join(sorted(unknown))}; allowed: {', '.join(TABLES)}")
    if not torch.cuda.is_available():
        print("tune_convolution times kernels on a GPU, and there is none", file=sys.stderr)
        return 2
    for table in options.table:
        name, rows = TABLES[table]
        module, path = importlib.import_module(f"fastseg.kernels.convolution.{name}"), KERNELS / f"{name}.py"
        for key in getattr(module, rows):
            calls = [call(table, key, shape) for shape in shapes(table, key)]
            torch.backends.cudnn.conv.fp32_precision = "ieee" if key[0] == "ieee" else "tf32"
            milliseconds, config = best(table, key, module, calls)
            print(f"{table} {key}: {config}, {milliseconds:.3f} ms", flush=True)
            if not options.dry_run:
                path.write_text(rewritten(path.read_text(), table, key, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
