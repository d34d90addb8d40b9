"""`pytest benchmarks`: every case at a small size under pytest-benchmark, ours next to stock eager.

A case whose check fails is not timed, and its test fails. `python -m benchmarks.run` gives the figures to quote.
"""

import pytest
import torch

from benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    case for op in harness.op_names() for case in harness.cases_of(op) if DEVICE in case.devices and not case.compiled
]
CONTESTANTS = [
    pytest.param(case, name, id=f"{case.title} {name}")
    for case in CASES
    for name, peer in {harness.OURS: None, **case.peers}.items()
    if peer is None or not (peer.compiled or peer.missing or DEVICE not in peer.devices)
]


@pytest.mark.parametrize(("case", "name"), CONTESTANTS)
def test_case(benchmark, case, name):
    quick = case.quick()
    torch.manual_seed(0)
    inputs = quick.make(quick.shape, torch.device(DEVICE), quick.dtype, quick.layout)
    if name == harness.OURS:
        wrong = harness.check(quick, inputs)
        assert wrong is None, wrong
    running, _ = harness.contestants(quick, inputs, DEVICE)
    step = running[name].step(quick.backward)

    def call():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = quick.title
    benchmark(call)
