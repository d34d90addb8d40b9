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
    """Pool, a layer, unpool; `use` is called with the indices before the unpooling."""

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
        return indices.clone() + 0 * indices.float().long()


class KeepsIndices(Pair):
    def use(self, indices):
        self.kept = indices
        return indices

    def forward(self, x):
        return super().forward(x), self.kept[:, 0] // 12, torch.equal(self.kept, self.kept.cpu())


class UnpoolsByTorch(Pair):
    def forward(self, x):
        values, where = self.shrink(x)
        return nn.functional.max_unpool2d(self.between(values), where, 2, output_size=x.shape)


class ReturnsThePair(Pair):
    def forward(self, x):
        return self.shrink(x)


class CannotBeTraced(Pair):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class CallsThePoolTwice(Pair):
    def forward(self, x):
        values, where = self.shrink(x)
        more, others = self.shrink(values)
        return self.grow(self.grow(more, others, values.size()), indices=where)


def hooked():
    model = Pair()
    model.shrink.register_forward_hook(lambda module, inputs, outputs: (outputs[0], outputs[1].float().long()))
    return model


def hooked_unpool():
    model = Pair()
    model.grow.register_forward_pre_hook(lambda module, inputs: (inputs[0], inputs[1].roll(1, 0)))
    return model


class OwnUnpool(nn.MaxUnpool2d):
    pass


def outputs_of(model, x):
    results = model(x)
    return results if isinstance(results, tuple) else (results,)


def check_same_results(stock, ours, x):
    """Outputs are bitwise equal, for either format of the indices, in both modes."""
    for training in (True, False):
        expected, found = outputs_of(stock.train(training), x), outputs_of(ours.train(training), x)
        for one, two in zip(found, expected, strict=True):
            assert one is two if isinstance(one, bool) else one.dtype == two.dtype and torch.equal(one, two)


MODELS = [
    Pair(), CallsThePoolTwice(), ReturnsIndices(), LooksAtIndices(), KeepsIndices(), UnpoolsByTorch(), ReturnsThePair(),
    CannotBeTraced(), hooked(), hooked_unpool(), Pair(unpool=OwnUnpool(2)),
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_whatever_is_done_with_compact_indices_gives_what_stocks_give(model):
    ours = copy.deepcopy(model)
    report = fastseg.accelerate(ours)
    assert {entry.note for entry in report.replaced} <= {"compact indices", None}
    assert "MaxPool2d -> fastseg.nn.MaxPool2d (compact indices)" in str(report)
    x = image(2, 3, 8, 12)
    assert isinstance(ours.shrink.forward(x)[1], PoolIndices)
    check_same_results(model, ours, x)


@pytest.mark.parametrize(
    "pool, reason",
    [
        (nn.MaxPool2d(16, return_indices=True), "its window has more than 255 taps"),
        (nn.MaxPool2d((2, 128), return_indices=True), "its window has more than 255 taps"),
        (nn.MaxPool2d(2, dilation=(1, 2), return_indices=True), "its windows are dilated"),
    ],
)
def test_windows_that_one_byte_does_not_hold_keep_int64(pool, reason):
    stock = copy.deepcopy(pool)
    (entry,) = fastseg.accelerate(pool).replaced
    assert entry.note.startswith(f"int64 indices: {reason}")
    x = image(2, 3, 20, 140)
    assert not isinstance(pool(x)[1], PoolIndices)
    check_same_results(stock, pool, x)


def test_a_flag_flipped_later_is_followed():
    pool = nn.MaxPool2d(2)
    assert [entry.note for entry in fastseg.accelerate(pool).replaced] == [None]
    pool.return_indices = True
    assert isinstance(pool(image(1, 2, 4, 4))[1], PoolIndices)
    pool.dilation = 2
    assert not isinstance(pool(image(1, 2, 4, 4))[1], PoolIndices)


def test_in_graphs_and_functional_transforms_the_indices_are_int64():
    torch._dynamo.reset()
    stock = ReturnsIndices()
    ours = copy.deepcopy(stock)
    fastseg.accelerate(ours)
    x = image(2, 3, 8, 12)
    runs = {
        "compile": torch.compile(ours, fullgraph=True, backend="aot_eager")(x),
        "export": torch.export.export(ours, (x,)).module()(x),
        "make_fx": torch.fx.experimental.proxy_tensor.make_fx(ours)(x)(x),
        "vmap": [result.flatten(0, 1) for result in torch.vmap(ours)(x[:, None])],
        "functional_call": torch.func.functional_call(ours, dict(ours.named_parameters()), (x,)),
    }
    for name, found in runs.items():
        assert torch.equal(found[0], stock(x)[0]) and torch.equal(found[1], stock(x)[1]), name
        assert isinstance(found[1], PoolIndices) == (name == "functional_call")


def test_gradients_of_a_compact_pair_equal_stocks():
    for stock in (Pair(), UnpoolsByTorch()):
        ours = copy.deepcopy(stock)
        fastseg.accelerate(ours)
        gradients = []
        for model in (stock, ours):
            x = image(2, 3, 8, 12).requires_grad_()
            model(x).square().sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
