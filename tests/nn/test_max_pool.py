"""`fastseg.nn.MaxPool2d` and `MaxUnpool2d`, and which pairs `fastseg.accelerate` gives compact indices."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.ops import PoolIndices

POOL = dict(kernel_size=3, stride=2, padding=1, dilation=1, return_indices=True, ceil_mode=True)


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arguments", [dict(kernel_size=2), POOL, dict(kernel_size=(2, 3), dilation=2)])
def test_pool_equals_stock(arguments):
    ours, stock = fastseg.nn.MaxPool2d(**arguments), nn.MaxPool2d(**arguments)
    assert repr(ours) == repr(stock)
    outputs, expected = ours(image(2, 3, 9, 11)), stock(image(2, 3, 9, 11))
    if not arguments.get("return_indices"):
        outputs, expected = (outputs,), (expected,)
    assert all(torch.equal(one, two) for one, two in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("shape, size", [((2, 3, 8, 12), None), ((3, 9, 11), (9, 11)), ((2, 3, 9, 11), (2, 3, 9, 11))])
def test_unpool_equals_stock_in_both_formats(shape, size):
    values, indices = nn.MaxPool2d(2, return_indices=True)(image(*shape))
    expected = nn.MaxUnpool2d(2)(values, indices, output_size=size)
    for given in (indices, PoolIndices.from_flat(indices, shape, 2)):
        assert torch.equal(fastseg.nn.MaxUnpool2d(2)(values, given, output_size=size), expected)


def test_arguments_of_stock_come_first():
    for name in ("MaxPool2d", "MaxUnpool2d"):
        stock = list(inspect.signature(getattr(nn, name)).parameters.values())
        ours = list(inspect.signature(getattr(fastseg.nn, name)).parameters.values())
        given = [(parameter.name, parameter.default) for parameter in ours]
        assert given[: len(stock)] == [(parameter.name, parameter.default) for parameter in stock]


def test_index_format_survives_copies():
    pool = fastseg.nn.MaxPool2d(2, return_indices=True, index_format="compact")
    for same in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert isinstance(same(image(1, 2, 4, 4))[1], PoolIndices)
    with pytest.raises(ValueError, match="index_format='bytes'"):
        fastseg.nn.MaxPool2d(2, index_format="bytes")


class Pair(nn.Module):
    """Pool, a layer between, unpool; `use` gets the indices on their way."""

    def __init__(self, pool=None, unpool=None):
        super().__init__()
        self.shrink = pool or nn.MaxPool2d(2, return_indices=True)
        self.between = nn.Conv2d(3, 3, 1)
        self.grow = unpool or nn.MaxUnpool2d(2)

    def use(self, indices):
        return indices

    def forward(self, x):
        values, where = self.shrink(x)
        return self.grow(self.between(values), self.use(where), output_size=x.size())


class ReturnsIndices(Pair):
    def forward(self, x):
        values, where = self.shrink(x)
        return self.grow(self.between(values), where), where


class LooksAtIndices(Pair):
    def use(self, indices):
        return indices.clone()


class LooksWhenEvaluated(Pair):
    def use(self, indices):
        return indices if self.training else indices + 0


class ReturnsThePair(Pair):
    def forward(self, x):
        return self.shrink(x)


class CannotBeTraced(Pair):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class CountsCalls(Pair):
    calls = 0

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        return super().forward(x)


class CallsThePoolTwice(Pair):
    def forward(self, x):
        values, where = self.shrink(x)
        more, others = self.shrink(values)
        return self.grow(self.grow(more, others, values.size()), indices=where)


class NeverCallsIt(Pair):
    def forward(self, x):
        return self.between(x)


def hooked():
    model = Pair()
    model.shrink.register_forward_hook(lambda module, inputs, outputs: None)
    return model


def hooked_unpool():
    model = Pair()
    model.grow.register_forward_pre_hook(lambda module, inputs: None)
    return model


class OwnUnpool(nn.MaxUnpool2d):
    pass


def outputs_of(model, x):
    results = model(x)
    return results if isinstance(results, tuple) else (results,)


def check_same_results(stock, ours, x):
    """Outputs bit by bit, whichever the indices, in both modes."""
    for training in (True, False):
        expected, found = outputs_of(stock.train(training), x), outputs_of(ours.train(training), x)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("model", [Pair(), CallsThePoolTwice(), CountsCalls()])
def test_pairs_that_are_safe_become_compact(model):
    ours = copy.deepcopy(model)
    report = fastseg.accelerate(ours)
    assert ours.shrink.index_format == "compact"
    assert {entry.note for entry in report.replaced} == {"compact indices", None}
    assert "(compact indices)" in str(report)
    assert getattr(ours, "calls", 0) == 0 and not hasattr(ours, "last")  # a copy was traced
    check_same_results(model, ours, image(2, 3, 8, 12))


@pytest.mark.parametrize(
    "model, reason",
    [
        (ReturnsIndices(), "its indices go to the model's output"),
        (LooksAtIndices(), "its indices go to call_method clone"),
        (LooksWhenEvaluated(), "its indices go to call_function add"),
        (ReturnsThePair(), "goes to the model's output as a whole"),
        (CannotBeTraced(), "torch.fx cannot trace the model"),
        (NeverCallsIt(), "does not call it"),
        (hooked(), "it has hooks"),
        (hooked_unpool(), "the unpooling grow has hooks"),
        (Pair(unpool=OwnUnpool(2)), "which was not replaced"),
        (Pair(pool=nn.MaxPool2d(2, padding=1, return_indices=True)), "another kernel, stride or padding"),
        (Pair(pool=nn.MaxPool2d(16, return_indices=True)), "more than 255 taps"),
        (Pair(pool=nn.MaxPool2d(2, dilation=2, return_indices=True)), "dilated"),
    ],
)
def test_everything_else_keeps_int64_and_says_why(model, reason):
    stock = copy.deepcopy(model)
    report = fastseg.accelerate(model)
    assert model.shrink.index_format == "flat"
    (note,) = [entry.note for entry in report.replaced if entry.note]
    assert note.startswith("int64 indices: ") and reason in note
    if not reason.startswith(("another", "dilated", "more than")):  # those cannot run on this image
        check_same_results(stock, model, image(2, 3, 8, 12))


def test_gradients_of_a_compact_pair_equal_stocks():
    stock = Pair()
    ours = copy.deepcopy(stock)
    fastseg.accelerate(ours)
    gradients = []
    for model in (stock, ours):
        x = image(2, 3, 8, 12).requires_grad_()
        model(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_pools_without_indices_get_no_note():
    report = fastseg.accelerate(nn.Sequential(nn.MaxPool2d(2)))
    assert [entry.note for entry in report.replaced] == [None]
