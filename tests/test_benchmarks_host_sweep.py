"""`benchmarks.run host` and `sweep`: random calls, measurement, targets and saved results."""

import argparse
import functools
import json
import random

import pytest
import torch

import fastseg.ops
from benchmarks import harness, host, measure, report, results, run, sweep, workloads
from fastseg._op import REGISTRY


@pytest.mark.parametrize("workload", workloads.WORKLOADS, ids=lambda workload: workload.name)
def test_a_workload_and_its_stock_do_the_same(workload):
    torch.manual_seed(0)
    inputs = workload.make((2, 5, 9, 10), torch.device("cpu"), workload.dtypes[0], "channels_last")
    found = []
    for function in workload.contestants("cpu").values():
        leaves = harness.differentiable(inputs, workload.differentiable)
        result = harness.first_tensor(function(*leaves))
        if workload.differentiable:
            result.backward(torch.ones_like(result))
        found.append((result.double(), leaves[0].grad))
    (ours, our_gradient), (stock, stock_gradient) = found
    torch.testing.assert_close(ours, stock, rtol=1.3e-6, atol=1e-5)  # the tolerance of float32
    if workload.differentiable:
        torch.testing.assert_close(our_gradient, stock_gradient, rtol=1e-4, atol=1e-6)


def test_turns_alternate_and_warm_up_first():
    called = []
    calls = {name: functools.partial(called.append, name) for name in "ab"}
    timings = measure.measure_turns(calls, fewest=10)
    assert called == ["a", "b"] * 10
    assert len(timings["a"].seconds) == len(timings["b"].seconds) == 8
    assert len(measure.measure_turns(calls, fewest=2, budget=0.01)["a"].seconds) > 2


def test_python_calls_are_counted():
    def inner():
        return 1

    assert host.python_calls(inner) == 1
    assert host.python_calls(lambda: inner() + inner()) == 3


@pytest.mark.parametrize("case", host.CASES, ids=lambda case: case.title)
def test_a_small_call_is_measured(case):
    record = host.measured(case, turns=3)
    assert record["turns"] == 2 and record["fastseg_us"] > 0 and record["stock_us"] > 0
    assert 0 < record["python_calls"] < 200
    assert len(host.judged(record)) == (case.at_most is not None) + (case.most_calls is not None)


def test_what_stands_in_for_triton_does_not_outlive_its_measurement():
    op = REGISTRY["cross_entropy"]
    with host.stopping_at_the_launch("cross_entropy"):
        logits, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
        fastseg.ops.cross_entropy(logits, labels, backend="triton")
        assert any(backend == "triton" for backend, *_ in op._choices)
    assert not any(backend == "triton" for backend, *_ in op._choices)


def test_missed_targets_of_small_calls_are_said():
    record = {
        "case": "some call", "fastseg_us": 12.0, "stock_us": 2.0, "ratio": 6.0, "ratio_quartiles": [5.9, 6.1],
        "python_calls": 20, "turns": 9, "targets": {"ratio": 5, "python_calls": 20},
    }  # fmt: skip
    assert host.target_cell(record) == "**missed** <= 5x stock; <= 20 Python calls"
    assert host.tables([record], targets=True)[0][1][0] == [*host.row(record), host.target_cell(record)]
    assert host.verdict([record], targets=True).endswith("targets: 1 reached, 1 missed")


@pytest.mark.parametrize("channels", [(1, 1), (2, 150), (1, 256)])
def test_drawn_shapes_keep_to_their_limits(channels):
    draw = random.Random(0)
    sizes = []
    for _ in range(300):
        images, count, height, width = sweep.drawn_shape(draw, channels)
        assert 1 <= images <= 4 and channels[0] <= count <= channels[1] and height >= 2 and width >= 2
        sizes.append(images * count * height * width)
    assert 100 < min(sizes) < 1000 and 3e6 < max(sizes) < 7e6


@pytest.mark.parametrize(
    ("ours", "stock", "lost"),
    [(13e-6, 10e-6, False), (16e-6, 10e-6, True), (1.1, 1.0, False), (1.2, 1.0, True), (1.0, 2.0, False)],
)
def test_a_loss_is_large_in_share_and_in_time(ours, stock, lost):
    assert sweep.is_lost(ours, stock) == lost


def timings_of(*medians):
    """Results for consecutive measurements."""
    pairs = iter(medians)

    def measure_turns(steps, fewest, budget):
        return {name: measure.Timing([value] * 3, [True] * 3) for name, value in zip(steps, next(pairs))}

    return measure_turns


@pytest.mark.parametrize(("second", "lost"), [((1.0, 1.0), False), ((1.5, 1.0), True)])
def test_a_loss_is_measured_twice(monkeypatch, second, lost):
    monkeypatch.setattr(measure, "measure_turns", timings_of((2.0, 1.0), second))
    call = sweep.Call(workloads.named("max_pool2d 2x2"), (1, 2, 4, 4), torch.float32, "contiguous", True)
    record = sweep.measured(call, "default")
    assert (record["lost"], record["ratio"], record["elements"]) == (lost, second[0], 32)


def test_the_sweep_changes_the_allocator_halfway_and_saves(monkeypatch, capsys, tmp_path):
    tuned = []
    monkeypatch.setattr(fastseg, "tune_allocator", lambda: tuned.append(True))
    monkeypatch.setattr(sweep, "LARGEST", 400)
    output = tmp_path / "sweep.json"
    assert run.main(["sweep", "--calls", "3", "--seed", "1", "--json", str(output)]) == 0
    records = json.loads(output.read_text())["records"]
    assert [record["allocator"] for record in records] == ["default", "tuned", "tuned"] and tuned == [True]
    assert "of the calls\n" in capsys.readouterr().out


def sweep_record(**changes):
    return {
        "op": "max_pool2d 2x2", "shape": [1, 2, 4, 4], "elements": 32, "size": "1e1 to 1e2 elements",
        "dtype": "float32", "layout": "contiguous", "passes": "forward", "allocator": "default", "fastseg_us": 20.0,
        "stock_us": 10.0, **changes,
    }  # fmt: skip


def test_results_of_commands_are_not_those_of_ops(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    meta = {
        "device": "cpu", "device_name": "Example CPU", "threads": 1, "versions": {}, "commit": "abc", "dirty": False,
        "date": "2026-01-01T00:00:00",
    }  # fmt: skip
    options = argparse.Namespace(json=None, save=True)
    lost = sweep_record(ratio=2.0, lost=True)
    results.keep(options, "sweep", meta, [lost, sweep_record(ratio=0.5, lost=False)])
    assert results.machines("cpu") == [] and results.machines("cpu", "host") == []
    filled = report.filled("<!-- benchmarks:cpu:sweep -->\n<!-- /benchmarks:cpu:sweep -->")
    assert "Lost: 50.0% of the calls; target, at most 5%: missed" in filled
    assert "max_pool2d 2x2 1x2x4x4 float32 contiguous, forward, default allocator | 32 | 20 | 10 | 2.00" in filled
    assert report.filled(filled) == filled
