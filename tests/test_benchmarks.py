"""The benchmark code: counting, refusal, targets, and that the README shows the committed results."""

import dataclasses
import functools

import pytest
import torch

import fastseg.ops
from benchmarks import (
    against,
    charts,
    checks,
    harness,
    jobs,
    measure,
    memory,
    peers,
    report,
    results,
    run,
    table,
    worker,
)

SHAPE = (2, 3, 16, 16)
ALL_CASES = [case for op in harness.op_names() for case in harness.cases_of(op)]


def halved_sum(input):
    return (input * 0.5).sum()


def make(shape, device, dtype, layout):
    return (torch.randn(shape, device=device, dtype=dtype),)


def example(**changes) -> harness.Case:
    case = harness.Case(
        "example",
        SHAPE,
        make,
        halved_sum,
        {"eager": harness.Peer(halved_sum)},
        lambda shape, dtype: 4 * 2 * 3 * 16 * 16,
        checks.differentiable_within_policy(halved_sum),
        targets=(harness.Target("speedup", 0.0, "eager", "default"),),
    )
    return dataclasses.replace(case, **changes)


def quick_options(*arguments: str):
    return worker.parse(["example", "example", "--quick", *arguments])


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.title)
def test_case_is_well_formed(case):
    quick = case.quick()
    inputs = quick.make(quick.shape, torch.device("cpu"), quick.dtype, quick.layout)
    assert isinstance(inputs[0], torch.Tensor)
    assert 0 < case.minimal_bytes(quick.shape, quick.dtype) < case.minimal_bytes(case.shape, case.dtype)
    for target in case.targets:
        assert target.kind in ("speedup", "extra_memory", "memory_ratio", "bandwidth")
        assert target.peer == "best" or target.peer in case.peers
        assert target.device in case.devices
        assert target.allocator == "default" or target.device == "cpu"


def test_titles_are_unique_within_an_op(monkeypatch):
    module = type("module", (), {"CASES": [example(), example()]})
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: module)
    with pytest.raises(ValueError, match="share a title"):
        harness.cases_of("example")


def test_a_record_holds_every_contestant():
    record = worker.run_case(example(), quick_options())
    assert record["refused"] is None
    assert list(record["contestants"]) == ["fastseg", "eager"]
    assert record["contestants"]["fastseg"]["ratio"] == 1
    assert record["contestants"]["eager"]["median_ms"] > 0
    assert "reached" in table.text(record, targets=True)


WRONG = {"value": lambda input: (input * 0.51).sum(), "shape": lambda input: halved_sum(input).view(1)}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_op_is_refused_and_not_timed(wrong):
    record = worker.run_case(example(ours=wrong), quick_options())
    assert record["refused"]
    assert "contestants" not in record


def test_an_op_that_raises_is_refused():
    def broken(input):
        raise NotImplementedError("no such kernel")

    assert "no such kernel" in worker.run_case(example(ours=broken), quick_options())["refused"]


def test_a_peer_that_fails_is_reported_and_ours_is_timed():
    def broken(input):
        raise RuntimeError("cannot do this")

    record = worker.run_case(example(peers={"other": harness.Peer(broken)}), quick_options())
    assert "cannot do this" in record["skipped_peers"]["other"]
    assert list(record["contestants"]) == ["fastseg"]


def test_a_missing_package_is_reported():
    peer = harness.Peer(halved_sum, missing=peers.missing("no_such_package"))
    running, skipped = harness.contestants(example(peers={"other": peer}), (torch.zeros(1),), "cpu")
    assert list(running) == ["fastseg"]
    assert skipped == {"other": "no_such_package is not installed"}


def test_a_peer_gets_its_layout_and_dtype():
    seen = {}

    def look(input):
        seen["strides"], seen["dtype"] = input.stride(), input.dtype
        return input.sum()

    peer = harness.Peer(look, layout="channels_last", dtype=torch.float64)
    case = example(peers={"other": peer})
    running, _ = harness.contestants(case, make(SHAPE, "cpu", torch.float32, "contiguous"), "cpu")
    running["other"].step(backward=True)()
    assert seen == {"strides": (16 * 16 * 3, 1, 16 * 3, 3), "dtype": torch.float64}


def test_labels_must_be_those_of_the_maximum():
    scores = torch.randn(1, 5, 4, 4)
    case = example(ours=lambda scores: scores.argmax(1), backward=False)
    verify = checks.labels_of_maximum(lambda scores: scores)
    assert verify(case, (scores,)) is None
    wrong = dataclasses.replace(case, ours=lambda scores: scores.argmin(1))
    assert "falls" in verify(wrong, (scores,))


def test_integer_results_must_be_equal():
    counts = torch.arange(9).view(3, 3)
    verify = checks.equal_to(lambda counts: counts)
    assert verify(example(ours=lambda counts: counts.int()), (counts,)) is None
    assert verify(example(ours=lambda counts: counts + 1), (counts,)) == "9 of 9 elements differ"


def test_disturbed_samples_are_dropped():
    timing = measure.Timing([1.0, 9.0, 1.2, 1.1], [True, False, True, True])
    assert timing.median == 1.1
    assert timing.reliable
    assert not measure.Timing([1.0, 9.0], [True, False]).reliable
    steady = measure.Timing([2.0, 2.0, 2.4, 2.2], [True] * 4)
    assert measure.ratio_quartiles(steady, timing) == pytest.approx((2.0, 2.0))


@pytest.mark.skipif(memory.peak_extra_cpu(lambda: None) is None, reason="this system tells no peak memory")
def test_peak_memory_counts_temporaries_and_results():
    size = 48 * 2**20

    def call():
        temporary = torch.ones(size, dtype=torch.uint8)
        return temporary[: size // 2].clone()

    call()
    assert memory.peak_extra_cpu(call) == pytest.approx(1.5 * size, abs=2e6)
    assert memory.peak_extra_cpu(lambda: None) < 2e6


def figures(median_ms, ratio, extra_bytes, ours=False):
    return {
        "median_ms": median_ms,
        "ratio": ratio,
        "ratio_quartiles": [ratio, ratio],
        "extra_bytes": extra_bytes,
        "ours": ours,
        "reliable": True,
    }


RECORD = {
    "op": "example",
    "case": "1x2",
    "backward": True,
    "allocator": "tuned",
    "minimal_bytes": 8_000_000,
    "copy_bytes_per_second": 10e9,
    "skipped_peers": {},
    "targets": [],
    "flops": None,
    "backends": {"example": "cpu"},
    "contestants": {
        "fastseg": figures(1.0, 1.0, 10_000_000, ours=True),
        "eager": figures(6.0, 6.0, 80_000_000),
        "compile": figures(2.0, 2.0, 40_000_000),
        "fastseg float32": figures(0.5, 0.5, 5_000_000, ours=True),
    },
}


@pytest.mark.parametrize(
    ("kind", "value", "peer", "expected"),
    [
        ("speedup", 2.0, "best", (2.0, "compile", True)),
        ("speedup", 2.1, "best", (2.0, "compile", False)),
        ("speedup", 6.0, "eager", (6.0, "eager", True)),
        ("speedup", 1.0, "absent", (None, "absent", False)),
        ("extra_memory", 10e6, "best", (10_000_000, None, True)),
        ("extra_memory", 9e6, "best", (10_000_000, None, False)),
        ("memory_ratio", 4.0, "best", (4.0, "compile", True)),
        ("bandwidth", 0.8, "best", (pytest.approx(0.8), None, True)),
        ("bandwidth", 0.81, "best", (pytest.approx(0.8), None, False)),
    ],
)
def test_targets_are_judged(kind, value, peer, expected):
    target = dataclasses.asdict(harness.Target(kind, value, peer))
    assert results.judge(RECORD, target) == expected


def test_losses_and_missed_targets_are_said():
    slow = RECORD | {"contestants": RECORD["contestants"] | {"compile": figures(0.5, 0.5, 0)}}
    slow["targets"] = [dataclasses.asdict(harness.Target("speedup", 2.0))]
    assert "LOST to compile" in table.text(slow, targets=False) and "MISSED" not in table.text(slow, targets=False)
    assert "MISSED" in table.text(slow, targets=True)
    assert "0 reached, 1 missed" in table.targets([slow])
    assert "**missed**" in report.target_cell(slow)
    assert "**lost**" in report.full_row(slow)[-1]


def test_charts_know_what_they_show(tmp_path):
    pytest.importorskip("matplotlib")
    groups = [{"tuned": RECORD, "default": RECORD}]
    for name, chart in charts.OF_A_MACHINE.items():
        path = tmp_path / "images" / f"{name}.svg"
        assert not chart(groups).is_drawn_in(path)
        chart(groups).draw(path)
        assert chart(groups).is_drawn_in(path) and path.read_text().startswith("<?xml")
        other = {"contestants": RECORD["contestants"] | {"fastseg": figures(1.0, 1.0, 1, ours=True)}}
        assert name == "speedup" or not chart([{"tuned": RECORD | other | {"minimal_bytes": 1}}]).is_drawn_in(path)
    assert charts.speedups(groups).data == [["example 1x2", "compile", 2.0]]
    assert charts.memory(groups).data == [["example 1x2", "compile", 10.0, 40.0]]
    assert charts.roofline(groups).data == [["example", 0.8, 1.0]]


def test_figures_of_the_reference_say_so():
    record = RECORD | {"backends": {"example": "reference"}}
    assert "plain-PyTorch reference" in table.text(record, targets=False)
    assert "plain-PyTorch reference" in report.full_row(record)[0]


def test_the_backend_that_ran_is_recorded():
    call = fastseg.ops.sigmoid_focal_loss
    logits, targets = torch.randn(8), torch.ones(8)
    for _ in range(2):  # the choice is kept after the first call
        used = worker.backends_used(lambda: call(logits, targets, backend="reference"))
        assert used == {"sigmoid_focal_loss": "reference"}


def test_essential_cases_run_first_under_both_allocators(monkeypatch):
    cases = [
        example(name="first", targets=()),
        example(name="plain", targets=()),
        example(name="wanted"),
        example(op="other", name="sibling", targets=()),
    ]
    monkeypatch.setattr(harness, "cases_of", lambda op: cases)
    essential, others = jobs.plan(["example"], "cpu", "")
    named = [(job.titles[0].split()[1], job.allocator) for job in essential]
    assert named == [(name, each) for name in ("first", "wanted", "sibling") for each in ("default", "tuned")]
    assert [job.titles[0].split()[1] for job in others] == ["plain", "plain"]
    (on_cuda,), (others,) = jobs.plan(["example"], "cuda", "")
    assert [title.split()[1] for title in on_cuda.titles] == ["first", "sibling"]
    assert [title.split()[1] for title in others.titles] == ["plain", "wanted"]


def test_a_crash_costs_one_case(monkeypatch, capsys, tmp_path):
    cases = [example(name=name, targets=()) for name in ("sound", "crashing", "after")]
    monkeypatch.setattr(harness, "cases_of", lambda op: cases)
    started = []

    def run_worker(job, *arguments, **options):
        started.append(job.titles)
        done = [title for title in job.titles[:1] if "crashing" not in title]
        return [RECORD | {"case": title, "refused": None} for title in done], (
            "exit status -11: no message" if len(job.titles) > 1 or not done else None
        )

    monkeypatch.setattr(run, "run_worker", run_worker)
    options = run.parse(["cross_entropy", "--device", "cpu", "--json", str(tmp_path / "results.json")])
    session = run.Session(options)
    session.run(jobs.Job("example", tuple(case.title for case in cases), "default"))
    assert [len(titles) for titles in started] == [3, 1]
    assert [record["case"].split()[1] for record in session.all_records()] == ["sound", "after"]
    assert len(session.failures) == 1 and "crashing" in session.failures[0]


def test_cases_without_time_are_listed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(harness, "cases_of", lambda op: [example()])
    output = str(tmp_path / "results.json")
    arguments = ["cross_entropy", "--device", "cpu", "--json", output, "--time-limit", "0"]
    assert run.measure(run.parse(arguments)) == 0
    assert "Left out for lack of time:\n  " + example().title in capsys.readouterr().out


def test_a_refused_case_fails_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(harness, "cases_of", lambda op: [example()])
    refused = {"case": example().title, "refused": "value: error 1.0"}
    calls = []

    def run_worker(job, *rest, **options):
        calls.append(job)
        return [refused], None

    monkeypatch.setattr(run, "run_worker", run_worker)
    options = run.parse(["cross_entropy", "--device", "cpu", "--json", str(tmp_path / "results.json")])
    assert run.measure(options) == 1
    assert len(calls) == 1, "the tuned run of a refused case must not start"
    assert "NOT MEASURED: check failed: value: error 1.0" in capsys.readouterr().out


def test_markers_are_filled_and_filling_is_stable(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    record = RECORD | {"targets": [dataclasses.asdict(harness.Target("speedup", 2.0))]}
    for name in ("Example(R) CPU", "Another(TM) Processor"):
        meta = {
            "device": "cpu",
            "device_name": name,
            "threads": 2,
            "versions": {"torch": "2"},
            "commit": "abc",
            "dirty": True,
            "date": "2026-01-01T00:00:00",
        }
        results.save(results.folder(meta) / "op.json", meta, [record])
    assert [machine.name for machine in results.machines("cpu")] == ["another", "example-cpu"]
    text = "".join(
        f"a\n<!-- benchmarks:{name} -->\nold\n<!-- /benchmarks:{name} -->\n"
        for name in ("cpu:headline", "cpu:all", "cpu:targets", "cuda:all")
    )
    monkeypatch.setattr(report, "HEADLINES", ("example 1x2",))
    filled = report.filled(text)
    assert "old" not in filled
    assert filled.count("Example(R) CPU, 2 threads, torch 2, 2026-01-01 (commit abc with local changes)") == 2
    assert "| `example` 1x2 | Another(TM) Processor | 1 | 2 (compile) | 2.0x | 10.0 MB / 40.0 MB |" in filled
    assert "Slower than the fastest peer in 0 of 1 cases." in filled
    assert filled.count("Another(TM) Processor, 2 threads") == 2
    assert "Not yet measured." in filled
    assert report.filled(filled) == filled


def test_committed_tables_and_plots_are_what_the_results_say():
    wrong = [str(path) for path in report.outdated()]
    assert not wrong, f"run `python -m benchmarks.report`; out of date: {wrong}"


def test_the_readme_shows_the_cpu_results():
    readme = (results.ROOT / "README.md").read_text()
    assert "<!-- benchmarks:cpu:headline -->" in readme and "images/cpu-speedup.svg" in readme


def test_a_run_leaves_committed_results_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(results, "UNCOMMITTED", tmp_path / "build")
    meta = {"device": "cpu", "device_name": "Example CPU"}
    for arguments, where in (([], "build"), (["--save"], "committed")):
        results.keep(run.parse(["cross_entropy", "--device", "cpu", *arguments]), "cross_entropy", meta, [])
        assert (tmp_path / where / "cpu" / "example-cpu" / "cross_entropy.json").exists()
        assert len(list(tmp_path.rglob("*.json"))) == len(arguments) + 1
    with pytest.raises(SystemExit):
        run.parse(["cross_entropy", "--save", "--match", "19"])


def test_revisions_are_compared_pair_by_pair(monkeypatch, capsys):
    times = iter([1.0, 3.0, 2.0, 4.0, 1.0, 2.0, "exit status 1: broken", 1.0, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(harness, "cases_of", lambda op: [example()])
    monkeypatch.setattr(against, "build", lambda revision: results.ROOT / "elsewhere")
    monkeypatch.setattr(against, "time_once", lambda job, options, path: next(times))
    assert against.compare(run.parse(["cross_entropy", "--device", "cpu", "--against", "HEAD"])) == 1
    printed = capsys.readouterr().out
    assert "default allocator: 1.000 ms, 3.000 ms there, x2.00 (2.00 to 3.00)" in printed
    assert "tuned allocator: NOT COMPARED: exit status 1: broken" in printed


def test_an_unknown_revision_is_refused():
    with pytest.raises(SystemExit, match="there is no revision 'no-such-revision'"):
        against.build("no-such-revision")


def test_cuda_timings_rotate_through_the_copies(monkeypatch):
    clock = [0.0]  # milliseconds of a simulated device
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, later):
            return later.time - self.time

    def work(index):
        calls.append(index)
        clock[0] += 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    rotation = [functools.partial(work, index) for index in range(3)]
    timing = measure.measure_cuda({"ours": rotation}, budget=0.01)["ours"]
    assert timing.median == pytest.approx(0.002)
    assert calls[:2] == [0, 1], "warm-up"
    assert calls[2:11] == [0, 1, 2] * 3


def test_cold_cache_copies():
    small = torch.zeros(2**20, dtype=torch.uint8)
    large = torch.zeros(300 * 2**20, dtype=torch.uint8, device="meta")
    assert measure.copies_for_cold_cache((small, 3)) == 64
    assert measure.copies_for_cold_cache((torch.zeros(16 * 2**20, dtype=torch.uint8), small)) == 16
    assert measure.copies_for_cold_cache((large,)) == 2
