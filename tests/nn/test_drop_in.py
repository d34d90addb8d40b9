"""Drop-ins for stock modules: a traced, scripted or exported model (ONNX) is the same as without them."""

import copy

import pytest
import torch
from torch import nn

import fastseg

MODULES = {
    "pool": nn.MaxPool2d, "unpool": nn.MaxUnpool2d, "loss": nn.CrossEntropyLoss, "upsample": nn.Upsample,
    "upsample, corners": nn.UpsamplingBilinear2d, "convolution": nn.Conv2d, "transposed": nn.ConvTranspose2d,
}  # fmt: skip


class Network(nn.Module):
    """All modules with a replacement; with `unpool` False only those that torch.jit supports."""

    def __init__(self, unpool):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool, self.again = nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(3, 1, 1)
        self.loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]), ignore_index=255, label_smoothing=0.1)
        self.unpool = nn.MaxUnpool2d(2) if unpool else nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, image, labels):
        values, indices = self.pool(self.conv(image))
        return self.loss(self.unpool(self.again(values)), labels), indices


class WithUnpool(Network):
    def forward(self, image, labels):
        values, indices = self.pool(self.conv(image))
        return self.loss(self.unpool(self.again(values), indices), labels), indices


def data(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    batch, _, *size = shape
    return torch.randn(shape, generator=generator), torch.randint(4, (batch, *size), generator=generator)


def for_onnx(model, arguments):
    """The program that torch.onnx.export translates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        program = torch.export.export(model, arguments, dynamic_shapes=({0: torch.export.Dim.AUTO},) * len(arguments))
    return program.module()


TRACERS = {
    "jit.trace": lambda model: torch.jit.trace(model, data(2, 3, 8, 12)),
    "jit.trace of channels_last": lambda model: torch.jit.trace(
        model, (data(2, 3, 8, 12)[0].contiguous(memory_format=torch.channels_last), data(2, 3, 8, 12)[1])
    ),
    "jit.script": torch.jit.script,
    "fx.symbolic_trace": torch.fx.symbolic_trace,
    "onnx": lambda model: for_onnx(model, data(2, 3, 8, 12)),
}


def operations(module):
    """The operations of a traced module."""
    if isinstance(module, torch.jit.ScriptModule):
        return [node.kind() for node in module.inlined_graph.nodes()]
    return [str(node.target) for node in module.graph.nodes if node.op != "call_module"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TRACERS)
def test_a_traced_model_is_the_stock_one_also_at_other_sizes(name):
    stock = WithUnpool(True) if name in ("fx.symbolic_trace", "onnx") else Network(False)
    ours = copy.deepcopy(stock)
    assert len(fastseg.accelerate(ours).replaced) == 4
    traced = [TRACERS[name](model) for model in (stock, ours)]
    assert not any("fastseg" in operation for operation in operations(traced[1]))
    for shape in ((2, 3, 8, 12), (3, 3, 8, 12)):
        found, expected = traced[1](*data(*shape)), stock(*data(*shape))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert type(found[1]) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripting_leaves_the_model_as_it_was():
    model = Network(False)
    fastseg.accelerate(model)
    torch.jit.script(model)
    assert type(model.pool) is fastseg.nn.MaxPool2d and type(model(*data(2, 3, 8, 12))[1]) is fastseg.ops.PoolIndices


def test_torch_export_keeps_ours():
    model = WithUnpool(True)
    fastseg.accelerate(model)
    targets = {str(node.target) for node in torch.export.export(model, data(2, 3, 8, 12)).graph.nodes}
    assert {"fastseg.max_pool2d.default", "fastseg.max_unpool2d.default"} <= targets


@pytest.mark.parametrize("name", MODULES)
def test_every_replacement_runs_stocks_forward_on_proxies(name):
    """Finds a registered replacement that does not."""
    stock = MODULES[name]
    ours = getattr(fastseg.nn, stock.__name__)
    assert issubclass(ours, stock) and ours.forward.__wrapped__ is stock.forward
    assert ours.forward.__doc__ != stock.forward.__doc__


def test_every_registered_replacement_is_tested_here():
    from fastseg.accelerate import _rules

    assert {stock for stock, rule in _rules.items() if rule.replacement is not None} == set(MODULES.values())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_stock_cannot_do_is_ours_in_a_trace_and_is_not_scripted():
    loss = fastseg.nn.CrossEntropyLoss(ignore_index=255, zero_if_empty=True)
    logits, labels = torch.randn(2, 4, 6, 6), torch.full((2, 6, 6), 255)
    assert torch.jit.trace(loss, (logits, labels))(logits, labels) == 0
    assert fastseg.nn.CrossEntropyLoss(ignore_index=255)(logits, labels).isnan()
    with pytest.raises(RuntimeError, match="fastseg.nn.CrossEntropyLoss: torch.jit.script compiles CrossEntropyLoss"):
        torch.jit.script(nn.Sequential(loss))
    weighted, weights = fastseg.nn.CrossEntropyLoss(), torch.rand(2, 6, 6)
    labels = labels % 4
    traced = torch.jit.trace(weighted, (logits, labels, weights))
    torch.testing.assert_close(traced(logits, labels, weights), weighted(logits, labels, weights))
    without = fastseg.nn.CrossEntropyLoss(ignore_index=None)
    torch.testing.assert_close(torch.jit.trace(without, (logits, labels))(logits, labels), without(logits, labels))
