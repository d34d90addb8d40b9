"""Trains every network of the demo for the same number of steps and writes the table of docs/models.md.

`python -m examples.digits.table` trains them all, about an hour on two cores, and keeps the results in results.json,
network by network, and pictures in demo_output/table: a second call goes on where the first one ended. `--nets` trains
some of them again. Time and memory of a step are measured after all training, on a machine that should do nothing else.
"""

import argparse
import json
import unittest.mock
from pathlib import Path

import torch

import fastseg
from benchmarks import results
from benchmarks.measure import measure_turns
from benchmarks.memory import peak_extra_cpu
from examples.digits import picture, training
from examples.digits.__main__ import make_scenes
from examples.digits.networks import NAMES, choice_of
from examples.digits.scenes import IGNORE, normalised
from fastseg._op import Op

RESULTS = Path(__file__).parent / "results.json"
PICTURES = Path("demo_output") / "table"
DOCUMENT = results.ROOT / "docs" / "models.md"
MARKERS = ("<!-- digits -->\n", "<!-- /digits -->")
BATCH = 4
SCENES, TEST_SCENES = 500, 100
TIMED_STEPS = 10


def built(name):
    """The choice of that name and its network, with random weights."""
    torch.manual_seed(0)
    choice = choice_of(name)
    return choice, choice.build(choice.width).to(memory_format=torch.channels_last)


def trained(name, steps, train, test):
    """What one network reaches."""
    choice, network = built(name)
    training.train(
        network,
        choice.loss,
        *train,
        steps=steps,
        batch=BATCH,
        learning_rate=choice.learning_rate,
        report=lambda step: None,
    )
    predictions = training.predict(network, choice.predict, test[0])
    measured = training.evaluate(predictions, test[1])
    title = f"{name} after {steps} steps on held-out scenes: {training.summary(measured)}"
    shown = slice(0, 6)  # the first ones, without selection
    picture.draw(PICTURES / f"{name}.png", test[0][shown], test[1][shown], predictions[shown], title)
    return {
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "pixel_accuracy": round(measured["pixel_accuracy"].item(), 4),
        "mean_iou": round(measured["mean_iou"].item(), 4),
        "foreground_iou": round(foreground_iou(predictions, test[1]).item(), 4),
    }


def foreground_iou(predictions, labels):
    """Intersection over union of all digits together."""
    counted = labels != IGNORE
    predicted, true = (predictions > 0) & counted, (labels > 0) & counted
    return (predicted & true).sum() / (predicted | true).sum()


def step_costs(name, train):
    """Seconds and peak extra bytes of a training step of ours and with stock ops, medians of interleaved steps."""
    choice, network = built(name)
    images, labels = normalised(train[0][:BATCH]), train[1][:BATCH]

    def step():
        network.zero_grad()
        choice.loss(network, images, labels).backward()

    def stock_step():
        with unittest.mock.patch.object(Op, "__call__", call_stock):
            step()

    steps = {"ours": step, "stock": stock_step}
    timings = measure_turns(steps, fewest=TIMED_STEPS)
    return {
        name: {"seconds": round(timings[name].median, 5), "extra_bytes": peak_extra_cpu(call)}
        for name, call in steps.items()
    }


def call_stock(op, *args, call=Op.__call__, **named):
    """A call of an op by PyTorch's own function if there is one, else by the reference in PyTorch."""
    named.pop("backend", None)
    out = named.pop("out", None)
    if named:
        args += op._in_order(len(args), named)
    has_stock = op.stock is not None and op.stock.why_not(args) is None
    return call(op, *args, backend="stock" if has_stock else "reference", out=out)


def markdown(found):
    """The table of docs/models.md."""
    header = ["network", "parameters", "pixel accuracy", "mIoU", "IoU of all digits"]
    header += ["ms per step, with stock ops", "MB, with stock ops"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in found["networks"].items():
        ours, stock = row["step"]["ours"], row["step"]["stock"]
        cells = [
            f"`{name}`",
            f"{row['parameters']:,}",
            f"{row['pixel_accuracy']:.3f}",
            f"{row['mean_iou']:.3f}",
            f"{row['foreground_iou']:.3f}",
            f"{ours['seconds'] * 1e3:.0f}, {stock['seconds'] * 1e3:.0f}",
            f"{ours['extra_bytes'] / 1e6:.0f}, {stock['extra_bytes'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    meta, background = found["meta"], found["background"]
    caption = (
        f"{meta['device_name']}, {meta['threads']} threads, torch {meta['versions']['torch']}, {meta['date'][:10]}, "
        f"{row['steps']} steps. Background everywhere gives a pixel accuracy of {background['pixel_accuracy']:.3f} "
        f"and a mIoU of {background['mean_iou']:.3f}. Time and peak extra memory of a training step without the "
        "optimiser: with our kernels, and the same network with PyTorch's own functions in their place."
    )
    return "\n".join([caption, "", *lines])


def with_table(text, found):
    """`text` with a new table between the markers."""
    start, end = MARKERS
    before, _, after = text.partition(start)
    return before + start + markdown(found) + "\n" + end + after.partition(end)[2]


def main():
    parser = argparse.ArgumentParser(prog="python -m examples.digits.table", description=__doc__)
    parser.add_argument(
        "--nets", nargs="+", choices=NAMES, metavar="NAME", help="train these; by default those missing"
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each")
    options = parser.parse_args()
    fastseg.tune_allocator()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": {}}
    rows = found["networks"]
    PICTURES.mkdir(parents=True, exist_ok=True)
    train = make_scenes("training scenes", SCENES, training=True)
    test = make_scenes("test scenes", TEST_SCENES, training=False)
    for name in options.nets or [name for name in NAMES if name not in rows]:
        rows[name] = trained(name, options.steps, train, test)
        print(name, rows[name], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name in [name for name in rows if "step" not in rows[name]]:
        rows[name]["step"] = step_costs(name, train)
        print(name, rows[name]["step"], flush=True)
    background = training.evaluate(torch.zeros_like(test[1]), test[1])
    found = {
        "meta": results.meta("cpu", 0),
        "background": {figure: round(background[figure].item(), 4) for figure in ("pixel_accuracy", "mean_iou")},
        "networks": {name: rows[name] for name in NAMES if name in rows},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), found))


if __name__ == "__main__":
    main()
