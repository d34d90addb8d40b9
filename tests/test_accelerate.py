"""`fastseg.accelerate`: what it replaces stays the same module in all else; what it leaves, it explains."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.accelerate import register
from fastseg.testing import assert_within_policy


class NetworkWithLoss(nn.Module):
    """Somebody's module that holds both; the loss goes by two names."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
        )  # fmt: skip
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
    (replaced,) = report.replaced
    assert replaced.names == ("loss", "criteria.0")
    assert (replaced.before, replaced.after) == ("CrossEntropyLoss", "fastseg.nn.CrossEntropyLoss")
    (skipped,) = report.skipped
    assert skipped.names == ("net.3",)
    assert "UpsampleCrossEntropyLoss" in skipped.why
    assert report.unknown == {"Conv2d": 2, "ReLU": 1}
    lines = str(report).splitlines()
    assert lines[0] == "fastseg.accelerate: 1 replaced, 1 skipped"
    assert lines[1] == "  loss, criteria.0  CrossEntropyLoss -> fastseg.nn.CrossEntropyLoss"
    assert lines[2].startswith("  net.3             Upsample skipped: modules do not show")
    assert lines[3] == "  no replacement yet for: 2 Conv2d, 1 ReLU"


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


def test_other_interpolation_modes_are_merely_unknown():
    report = fastseg.accelerate(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest")))
    assert report.skipped == [] and report.unknown == {"Upsample": 1}


@pytest.mark.parametrize("model", [nn.functional.cross_entropy, None, torch.zeros(1)])
def test_only_modules_are_taken(model):
    with pytest.raises(TypeError, match="fastseg.accelerate: model is .*; allowed: torch.nn.Module"):
        fastseg.accelerate(model)


def test_a_replacement_must_be_a_subclass():
    with pytest.raises(TypeError, match="DiceLoss is not a subclass of CrossEntropyLoss"):
        register(nn.CrossEntropyLoss, fastseg.nn.DiceLoss)


def test_fastseg_models_can_be_passed():
    report = fastseg.accelerate(fastseg.models.FCN32s(2, width_multiplier=1 / 64))
    assert {entry.before for entry in report.replaced} <= {"MaxPool2d"} and report.unknown["Conv2d"] == 16
