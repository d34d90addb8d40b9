"""fastseg.metrics: the golden values, conventions for absent classes, batches and ranks."""

import copy
import io
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg import metrics
from fastseg.metrics import SegmentationMetrics

GOLDEN = torch.tensor([[50, 2, 3], [10, 20, 0], [0, 0, 0]])
GOLDEN_IOU = [0.769231, 0.625, 0.0]


@pytest.mark.parametrize(
    "function, expected",
    [
        (metrics.pixel_accuracy, 0.823529),
        (metrics.mean_accuracy, 0.787879),  # class 2 has no truth and is skipped
        (metrics.iou, GOLDEN_IOU),
        (metrics.mean_iou, 0.464744),  # class 2 is predicted and counts as 0
        (metrics.frequency_weighted_iou, 0.718326),
        (metrics.dice, [2 * value / (1 + value) for value in GOLDEN_IOU]),
        (metrics.mean_dice, sum(2 * value / (1 + value) for value in GOLDEN_IOU) / 3),
        (metrics.class_accuracy, [50 / 55, 20 / 30, float("nan")]),
    ],
)
def test_golden_values(function, expected):
    assert function(GOLDEN).tolist() == pytest.approx(expected, abs=6e-7, nan_ok=True)


def test_a_class_neither_true_nor_predicted_is_skipped():
    matrix = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    smaller = matrix[:2, :2]
    assert metrics.iou(matrix)[2].isnan() and metrics.dice(matrix)[2].isnan()
    for function in (
        metrics.mean_iou,
        metrics.mean_accuracy,
        metrics.mean_dice,
        metrics.frequency_weighted_iou,
    ):
        assert function(matrix) == function(smaller)


def test_nothing_counted_is_nan():
    empty = SegmentationMetrics(3).compute()
    assert all(value.isnan().all() for value in empty.values())


def test_more_pixels_than_float32_can_count():
    assert metrics.pixel_accuracy(torch.tensor([[2**25, 1], [0, 0]])).item() == 2**25 / (2**25 + 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(lambda size: st.lists(st.integers(0, 9), min_size=size * size, max_size=size * size)))
def test_metrics_are_what_the_definitions_say(entries):
    size = math.isqrt(len(entries))
    n = torch.tensor(entries).reshape(size, size)
    true, predicted = n.sum(1).tolist(), n.sum(0).tolist()
    hits = n.diagonal().tolist()
    overlap = [h / (t + q - h) for h, t, q in zip(hits, true, predicted) if t + q > 0]
    recall = [h / t for h, t in zip(hits, true) if t > 0]
    nan = float("nan")
    assert metrics.mean_iou(n).item() == pytest.approx(sum(overlap) / len(overlap) if overlap else nan, nan_ok=True)
    assert metrics.mean_accuracy(n).item() == pytest.approx(sum(recall) / len(recall) if recall else nan, nan_ok=True)
    iou = metrics.iou(n)
    torch.testing.assert_close(metrics.dice(n), 2 * iou / (1 + iou), equal_nan=True)
    assert metrics.frequency_weighted_iou(n).item() == pytest.approx(
        sum(t * i for t, i in zip(true, iou.tolist()) if t > 0) / sum(true) if sum(true) else nan, nan_ok=True
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_a_matrix_must_be_square(shape):
    with pytest.raises(ValueError, match=r"allowed: \(C, C\)"):
        metrics.mean_iou(torch.zeros(shape))


def batches(count, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        target = torch.randint(classes + 1, (2, 9, 7), generator=generator)
        target[target == classes] = 255
        yield torch.randn(2, classes, 9, 7, generator=generator), target


def test_batches_add_up_from_logits_or_labels():
    from_logits, from_labels = (
        SegmentationMetrics(5, ignore_index=255),
        SegmentationMetrics(5, ignore_index=255),
    )
    logits, targets = [], []
    for input, target in batches(3):
        from_logits.update(input, target)
        from_labels.update(input.argmax(1), target)
        logits.append(input)
        targets.append(target)
    at_once = SegmentationMetrics(5, ignore_index=255)
    at_once.update(torch.cat(logits), torch.cat(targets))
    assert torch.equal(from_logits.matrix, at_once.matrix)
    assert torch.equal(from_labels.matrix, at_once.matrix)
    assert at_once.matrix.sum() == sum((target != 255).sum() for target in targets)
    assert at_once.compute()["mean_iou"] == metrics.mean_iou(at_once.matrix)


def test_a_refused_batch_changes_nothing():
    counted = SegmentationMetrics(5, ignore_index=255)
    input, target = next(batches(1))
    counted.update(input, target)
    before = counted.matrix.clone()
    target[0, 0, 0] = 77
    with pytest.raises(IndexError):
        counted.update(input, target)
    assert torch.equal(counted.matrix, before)


def test_reset_forgets():
    counted = SegmentationMetrics(5, ignore_index=255)
    counted.update(*next(batches(1)))
    counted.reset()
    assert counted.matrix.sum() == 0


def test_all_reduce_without_a_process_group_is_a_copy():
    counted = SegmentationMetrics(5, ignore_index=255)
    counted.update(*next(batches(1)))
    total = counted.all_reduce()
    assert torch.equal(total.matrix, counted.matrix)
    total.update(*next(batches(1)))
    assert not torch.equal(total.matrix, counted.matrix)


def test_a_call_counts_and_gives_the_batchs_own_metrics():
    counted, one_by_one = SegmentationMetrics(5, ignore_index=255), SegmentationMetrics(5, ignore_index=255)
    for batch in batches(3):
        value = counted(*batch)
        alone = SegmentationMetrics(5, ignore_index=255)
        alone.update(*batch)
        one_by_one.update(*batch)
        assert list(value) == [function.__name__ for function in metrics.METRICS]
        assert all(torch.equal(value[name], expected) for name, expected in alone.compute().items())
        assert torch.equal(counted.matrix, one_by_one.matrix)


def test_scalars_are_what_a_logger_takes():
    counted = SegmentationMetrics(5, ignore_index=255)
    counted.update(*next(batches(1)))
    scalars, everything = counted.scalars(), counted.compute()
    assert set(everything) - set(scalars) == {"class_accuracy", "iou", "dice"}
    assert all(value.numel() == 1 and value == everything[name] for name, value in scalars.items())


class ModelWithMetrics(torch.nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 5, 1)
        self.metrics = SegmentationMetrics(5, ignore_index=255, device=device)


def test_counts_are_in_the_models_checkpoint():
    model = ModelWithMetrics()
    model.metrics.update(*next(batches(1)))
    state = model.state_dict()
    assert list(state) == ["head.weight", "head.bias", "metrics.matrix"]
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    resumed = ModelWithMetrics()
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    for batch in batches(2):
        model.metrics.update(*batch)
        resumed.metrics.update(*batch)
    assert torch.equal(resumed.metrics.matrix, model.metrics.matrix)
    assert torch.equal(copy.deepcopy(model).metrics.matrix, model.metrics.matrix)
    assert not torch.equal(state["metrics.matrix"], model.metrics.matrix)  # saved counts do not change
    fresh = SegmentationMetrics(5)
    fresh.load_state_dict(SegmentationMetrics(5).state_dict())
    assert fresh.matrix.sum() == 0


def test_a_checkpoint_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"metrics.matrix has shape \(4, 4\); allowed: \(5, 5\)"):
        ModelWithMetrics().load_state_dict({**ModelWithMetrics().state_dict(), "metrics.matrix": torch.zeros(4, 4)})
    without = {name: value for name, value in ModelWithMetrics().state_dict().items() if "matrix" not in name}
    with pytest.raises(RuntimeError, match="Missing key.*metrics.matrix"):
        ModelWithMetrics().load_state_dict(without)
    assert ModelWithMetrics().load_state_dict(without, strict=False).missing_keys == ["metrics.matrix"]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_counts_move_with_the_model_and_stay_integers(device):
    model = ModelWithMetrics(device).half()
    model.metrics.update(*next(batches(1)))
    total = model.metrics.matrix.sum()
    assert model.double().metrics.matrix.dtype == torch.int64 and model.metrics.matrix.sum() == total > 0
    assert model.to("meta").metrics.matrix.device.type == "meta"
    assert list(model.metrics.parameters()) == list(model.metrics.buffers()) == []  # DDP synchronises buffers


def _rank(rank: int, ranks: int, folder: str) -> None:
    """Rank 0 gets all batches but the first, rank 1 the first, rank 2 none."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    counted = SegmentationMetrics(5, ignore_index=255)
    for index, batch in enumerate(batches(4)):
        if rank == (1 if index == 0 else 0):
            counted.update(*batch)
    own = counted.matrix.clone()
    counted.all_reduce()
    total = counted.all_reduce()  # the second call must not add the first one's sum again
    assert torch.equal(counted.matrix, own)
    torch.save(total.matrix, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up(ranks, tmp_path):
    torch.multiprocessing.spawn(_rank, (ranks, str(tmp_path)), nprocs=ranks)
    expected = SegmentationMetrics(5, ignore_index=255)
    for batch in batches(4):
        expected.update(*batch)
    for rank in range(ranks):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected.matrix)
