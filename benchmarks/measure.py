"""Timing: interleaved rounds in one process, disturbed samples dropped, medians, ratios with their spread."""

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SHORTEST_SAMPLE = 0.004  # seconds; a faster call is repeated within one sample
DISTURBED = 0.02  # share of a sample's wall time that our threads may wait for a core before it is dropped
FEWEST_CLEAN = 7
COLD_BYTES = 256 * 2**20  # CUDA inputs are rotated over at least this much memory, several times any L2


@dataclass
class Timing:
    """Seconds per call, one entry per round; `clean[i]` says whether round i was undisturbed."""

    seconds: list[float]
    clean: list[bool]

    def kept(self) -> list[float]:
        """The clean samples, or all if fewer than three are clean (`reliable` is False then)."""
        kept = [value for value, clean in zip(self.seconds, self.clean) if clean]
        return kept if len(kept) >= 3 else self.seconds

    @property
    def median(self) -> float:
        return statistics.median(self.kept())

    @property
    def reliable(self) -> bool:
        return sum(self.clean) >= 3

    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.kept())


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratio_quartiles(peer: Timing, ours: Timing) -> tuple[float, float]:
    """Quartiles over the rounds of peer / ours, so that slow drifts of the machine cancel."""
    rounds = list(zip(peer.seconds, ours.seconds, peer.clean, ours.clean))
    paired = [theirs / mine for theirs, mine, *clean in rounds if all(clean)]
    return quartiles(paired if len(paired) >= 3 else [theirs / mine for theirs, mine, *_ in rounds])


def run_queue_wait() -> int:
    """Nanoseconds that the threads of this process have waited, ready to run, for a core (0 if unknown)."""
    waited = 0
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return 0
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                waited += int(file.read().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel keeps no statistics
            continue
    return waited


def sample(call: Callable, repeats: int) -> tuple[float, bool]:
    """Seconds per call of `repeats` calls, and True if our threads did not have to wait for a core."""
    waited = run_queue_wait()
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter() - start
    del result
    waited = (run_queue_wait() - waited) * 1e-9
    return elapsed / repeats, waited < DISTURBED * elapsed


def measure_cpu(calls: dict[str, Callable], budget: float = 1.5) -> dict[str, Timing]:
    """Time the calls in turn until each has enough clean samples: about `budget` seconds per call, at most four times
    that on a busy machine. A call starts with the cache contents of the call before it, so every round has another
    order; no round begins with the last call of the round before, which would find its own data.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        repeats[name] = max(1, int(SHORTEST_SAMPLE / max(elapsed, 1e-7)))
    timings = {name: Timing([], []) for name in calls}
    start = time.perf_counter()
    order, turns = random.Random(0), list(calls.items())
    while True:
        last = turns[-1]
        order.shuffle(turns)
        if turns[0] is last:
            turns.append(turns.pop(0))
        for name, call in turns:
            seconds, clean = sample(call, repeats[name])
            timings[name].seconds.append(seconds)
            timings[name].clean.append(clean)
        elapsed = time.perf_counter() - start
        fewest_clean = min(sum(timing.clean) for timing in timings.values())
        if elapsed > budget * len(calls) and fewest_clean >= FEWEST_CLEAN:
            return timings
        if elapsed > 4 * budget * len(calls):
            return timings


def measure_turns(calls: dict[str, Callable], fewest: int, budget: float = 0.0) -> dict[str, Timing]:
    """Time single calls in turn: at least `fewest` of each, and for `budget` seconds. The first fifth warms up.

    For calls of microseconds: a few disturbed turns among thousands do not change the medians, and detecting them
    would take longer than the call.
    """
    seconds = {name: [] for name in calls}
    began = time.perf_counter()
    turns = 0
    while turns < fewest or time.perf_counter() - began < budget:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        turns += 1
    warm = max(1, turns // 5)
    return {name: Timing(each[warm:], [True] * (turns - warm)) for name, each in seconds.items()}


def copies_for_cold_cache(inputs: tuple) -> int:
    """The number of copies of the inputs that, used in rotation, evict each other from the GPU's L2."""
    held = sum(value.nbytes for value in inputs if isinstance(value, torch.Tensor))
    return max(2, min(64, -(-COLD_BYTES // max(held, 1))))


def measure_cuda(calls: dict[str, list[Callable]], budget: float = 0.4) -> dict[str, Timing]:
    """Device time of each contestant; its calls use different copies of the inputs (cold L2).

    A sleep is queued before each batch, so that all launches are queued when the device starts: these figures
    include kernels and the gaps between them, but not the cost of launches.
    """
    per_batch = 5
    for rotation in calls.values():
        for call in rotation[:2]:
            call()
    torch.cuda.synchronize()
    timings = {name: Timing([], []) for name in calls}
    start = time.perf_counter()
    turn = 0
    while True:
        for name, rotation in calls.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(per_batch + 1)]
            torch.cuda._sleep(10_000_000)  # about 5 ms
            events[0].record()
            for index in range(per_batch):
                rotation[(turn * per_batch + index) % len(rotation)]()
                events[index + 1].record()
            torch.cuda.synchronize()
            spans = [first.elapsed_time(second) * 1e-3 for first, second in zip(events, events[1:])]
            timings[name].seconds.append(statistics.median(spans))
            timings[name].clean.append(True)
        turn += 1
        if turn >= FEWEST_CLEAN and time.perf_counter() - start > budget * len(calls):
            return timings


def copy_bandwidth(device: str) -> float:
    """Bytes per second (read plus written) of PyTorch's `destination.copy_(source)` on memory already mapped.

    On the CPU that copy writes through the caches, so each written line is read first: it reaches about half
    the rate of non-temporal stores. A kernel that streams its output, or whose data stays in a cache, may be
    faster.
    """
    size = (256 if device == "cpu" else 1024) * 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    destination = torch.zeros(size, dtype=torch.uint8, device=device)

    def copy():
        return destination.copy_(source)

    if device == "cpu":
        timing = measure_cpu({"copy": copy}, budget=0.3)["copy"]
    else:
        timing = measure_cuda({"copy": [copy]}, budget=0.2)["copy"]
    return 2 * size / timing.median
