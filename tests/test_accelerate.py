"""`fastseg.accelerate`: replaced modules stay the same otherwise; skipped modules have a reason; undo."""

import copy
import io
import pickle
import random
import threading

import pytest
import torch
from torch import nn

import fastseg
from fastseg.accelerate import register
from fastseg.testing import assert_within_policy


class NetworkWithLoss(nn.Module):
    """A module that contains network and loss; the loss has two names."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
        )
        self.loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]), ignore_index=255)
        self.criteria = nn.ModuleList([self.loss])

    def forward(self, image, labels):
        return self.loss(self.net(image), labels)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 8, 10, generator=generator).to(dtype)
    labels = torch.randint(0, 4, (2, 16, 20), generator=generator)
    labels[0, :3] = 255
    return image, labels


def loss_and_gradients(model, dtype):
    model = copy.deepcopy(model).to(dtype)
    loss = model(*batch(dtype))
    loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]


def test_outputs_and_every_gradient_stay_within_the_policy():
    torch.manual_seed(0)
    stock = NetworkWithLoss()
    ours = copy.deepcopy(stock)
    fastseg.accelerate(ours)
    assert type(ours.loss) is fastseg.nn.CrossEntropyLoss
    results = (
        loss_and_gradients(ours, torch.float32),
        loss_and_gradients(stock, torch.float32),
        loss_and_gradients(stock, torch.float64),
    )
    for values in zip(*results, strict=True):
        assert_within_policy(*values)


def test_report_names_what_was_replaced_and_why_the_rest_was_not():
    report = fastseg.accelerate(NetworkWithLoss())
    upsample, replaced = report.replaced
    assert replaced.names == ("loss", "criteria.0")
    assert (replaced.before, replaced.after) == ("CrossEntropyLoss", "fastseg.nn.CrossEntropyLoss")
    assert upsample.names == ("net.3",)
    assert "UpsampleCrossEntropyLoss" in upsample.note
    lines = str(report).splitlines()
    assert lines[0] == "fastseg.accelerate: 2 replaced, 0 skipped"
    assert lines[1].startswith("  net.3             Upsample -> fastseg.nn.Upsample (if it feeds a cross-entropy")
    assert lines[2] == "  loss, criteria.0  CrossEntropyLoss -> fastseg.nn.CrossEntropyLoss"
    assert len(lines) == 3  # no line for modules without a replacement


def test_the_module_itself_is_replaced_in_place():
    loss = nn.CrossEntropyLoss()
    report = fastseg.accelerate(loss)
    assert type(loss) is fastseg.nn.CrossEntropyLoss
    assert report.replaced[0].names == ("(the model itself)",)


def test_aliases_stay_one_module_inside_and_outside_of_the_tree():
    model = NetworkWithLoss()
    held_elsewhere = [model.loss]
    fastseg.accelerate(model)
    assert model.loss is model.criteria[0] is held_elsewhere[0]


def test_hooks_survive():
    model = NetworkWithLoss()
    seen = []
    model.loss.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    model.loss.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    model.loss.register_full_backward_hook(lambda module, inputs, outputs: seen.append("backward"))
    fastseg.accelerate(model)
    model(*batch()).backward()
    assert seen == ["before", "after", "backward"]


def test_state_mode_dtype_attributes_and_repr_survive():
    model = NetworkWithLoss().double()
    model.eval()
    model.loss.note = "mine"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, weight, modules = repr(model), model.loss.weight, list(model.named_modules())
    fastseg.accelerate(model)
    assert repr(model) == text
    assert model.loss.weight is weight and weight.dtype == torch.float64
    assert not model.loss.training
    assert model.loss.note == "mine"
    assert list(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    NetworkWithLoss().load_state_dict(model.state_dict())


def test_deepcopy_pickle_and_save_of_an_accelerated_model():
    model = NetworkWithLoss()
    fastseg.accelerate(model)
    expected = model(*batch())
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    reloaded = torch.load(stored, weights_only=False)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reloaded):
        assert type(clone.loss) is fastseg.nn.CrossEntropyLoss
        assert clone.loss is clone.criteria[0]
        assert torch.equal(clone(*batch()), expected)


def test_a_second_call_replaces_nothing():
    model = NetworkWithLoss()
    fastseg.accelerate(model)
    report = fastseg.accelerate(model)
    assert report.replaced == []
    reasons = {entry.names[0]: entry.why for entry in report.skipped}
    assert reasons["loss"] == "it is a fastseg module already"


class DoubledLoss(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return 2 * super().forward(input, target)


def test_subclasses_are_left_alone():
    model = nn.ModuleDict({"loss": DoubledLoss()})
    report = fastseg.accelerate(model)
    assert type(model["loss"]) is DoubledLoss
    assert report.skipped[0].why == "a subclass of CrossEntropyLoss may compute something else"


def test_a_forward_replaced_on_the_object_is_left_alone():
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda input, target: input.sum()
    report = fastseg.accelerate(loss)
    assert type(loss) is nn.CrossEntropyLoss
    assert report.skipped[0].why == "its forward was replaced on this very object"


def test_other_interpolation_modes_are_left_with_a_reason():
    report = fastseg.accelerate(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest")))
    assert report.replaced == [] and report.skipped[0].why.startswith("mode='nearest'")


@pytest.mark.parametrize("model", [nn.functional.cross_entropy, None, torch.zeros(1)])
def test_only_modules_are_taken(model):
    for function in (fastseg.accelerate, fastseg.restore):
        with pytest.raises(TypeError, match=f"fastseg.{function.__name__}: model is .*; allowed: torch.nn.Module"):
            function(model)


def test_a_replacement_must_be_a_subclass():
    with pytest.raises(TypeError, match="DiceLoss is not a subclass of CrossEntropyLoss"):
        register(nn.CrossEntropyLoss, fastseg.nn.DiceLoss)


def test_fastseg_models_can_be_passed():
    report = fastseg.accelerate(fastseg.models.FCN32s(2, width_multiplier=1 / 64))
    assert {entry.before for entry in report.replaced} <= {"MaxPool2d"}


class PoolsInside(nn.Module):
    """Network and loss in one, several uses of indices, an assert on shapes, a forward that must not run."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.pool, self.again = nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(3, 2, 1)
        self.unpool = nn.MaxUnpool2d(2)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, image, labels):
        self.runs += 1
        assert image.shape[2] % 2 == 0
        values, self.indices = self.pool(image)
        if isinstance(self.indices, torch.Tensor) and self.indices.float().mean() < 0:
            raise AssertionError
        return self.loss(self.unpool(values + self.again(image), self.indices), labels)


def pools_batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 8, 10, generator=generator), torch.randint(3, (2, 8, 10), generator=generator)


def state_of(model):
    """Class and attributes of every module; attributes by identity."""
    return [(type(module), {name: id(value) for name, value in vars(module).items()}) for module in model.modules()]


@pytest.mark.parametrize("undo", [lambda model, report: report.undo(), lambda model, report: fastseg.restore(model)])
@pytest.mark.parametrize("model, data", [(NetworkWithLoss(), batch()), (PoolsInside(), pools_batch())])
def test_undo_brings_back_classes_attributes_and_every_bit(model, data, undo):
    expected = model(*data)
    before = state_of(model)
    report = fastseg.accelerate(model)
    assert report.replaced and state_of(model) != before
    undo(model, report)
    assert state_of(model) == before
    assert torch.equal(model(*data), expected)
    undo(model, report)  # a second time: nothing to undo
    assert fastseg.restore(model) == 0 and type(model.loss) is nn.CrossEntropyLoss


def test_restore_finds_what_was_replaced_in_copies_and_leaves_what_the_user_built():
    model = nn.ModuleDict({"stock": nn.CrossEntropyLoss(), "own": fastseg.nn.CrossEntropyLoss(zero_if_empty=True)})
    model["pool"] = fastseg.nn.MaxPool2d(2, return_indices=True, index_format="compact")
    report = fastseg.accelerate(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fastseg.restore(clone) == 1
        kinds = [type(module) for module in clone.values()]
        assert kinds == [nn.CrossEntropyLoss, fastseg.nn.CrossEntropyLoss, fastseg.nn.MaxPool2d]
    assert type(model["stock"]) is fastseg.nn.CrossEntropyLoss
    report.undo()
    assert type(model["stock"]) is nn.CrossEntropyLoss


def test_the_model_is_not_run_and_no_random_number_is_drawn():
    model = PoolsInside()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    torch_state, state = torch.get_rng_state(), random.getstate()
    fastseg.accelerate(model)
    fastseg.restore(model)
    assert model.runs == 0 and torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == state


def test_many_threads_accelerate_run_and_restore():
    """Each thread with its own model, and all with the same model."""
    data, shared = pools_batch(), PoolsInside()
    expected = PoolsInside()(*data)
    failures = []

    def work():
        try:
            for _ in range(20):
                own = PoolsInside()
                fastseg.accelerate(own)
                fastseg.accelerate(shared)
                for model in (own, shared):
                    torch.testing.assert_close(model(*data), expected)
                fastseg.restore(own)
                fastseg.restore(shared)
                assert torch.equal(own(*data), expected)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and type(shared.pool) is nn.MaxPool2d


def test_a_compiled_root():
    torch._dynamo.reset()
    model = torch.compile(PoolsInside(), backend="aot_eager")
    expected = model(*pools_batch())
    report = fastseg.accelerate(model)
    assert [entry.names for entry in report.replaced][0] == ("_orig_mod.pool",)
    torch.testing.assert_close(model(*pools_batch()), expected)
    assert type(model._orig_mod.indices) is torch.Tensor  # int64 in graphs
    report.undo()
    assert torch.equal(model(*pools_batch()), expected)


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = NetworkWithLoss()
        expected = model(*batch())
        model = nn.parallel.DistributedDataParallel(model)
        report = fastseg.accelerate(model)
        assert report.replaced[1].names == ("module.loss", "module.criteria.0")
        loss = model(*batch())
        loss.backward()
        torch.testing.assert_close(loss, expected)
        report.undo()
        assert torch.equal(model(*batch()), expected)
    finally:
        torch.distributed.destroy_process_group()
