"""`PoolIndices`: for everything except an unpooling they behave as torch's int64 indices."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.ops import PoolIndices, max_pool2d, max_unpool2d

SHAPE = (2, 3, 9, 11)
POOL = dict(kernel_size=3, stride=2, padding=1)


def both(layout=torch.contiguous_format, shape=SHAPE):
    """(values, ours, stock's) for one image."""
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    image = image.contiguous(memory_format=layout) if len(shape) == 4 else image
    values, ours = max_pool2d(image, **POOL, return_indices=True, index_format="compact")
    return values, ours, F.max_pool2d(image, **POOL, return_indices=True)[1]


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.device == two.device and one.stride() == two.stride() and one.equal(two)
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def unpooled_by_stock(indices):
    values = torch.arange(float(indices.numel())).view(indices.shape).requires_grad_()
    output = F.max_unpool2d(values, indices, **POOL)
    (gradient,) = torch.autograd.grad(output.square().sum(), values)
    return output.detach(), gradient


def after_hooks(indices):
    module = torch.nn.Identity()
    module.register_forward_hook(lambda module, inputs, output: output + inputs[0])
    return module(indices)


def as_buffer(indices):
    module = torch.nn.Module()
    module.register_buffer("indices", indices)
    return list(module.double().state_dict().values())


USES = {
    "float": lambda i: i.float(),
    "double": lambda i: i.to(torch.float64),
    "to another dtype and device": lambda i: i.to("meta", torch.float32).shape,
    "long": lambda i: i.long(),
    "cpu": lambda i: i.cpu(),
    "clone": lambda i: i.clone(),
    "clone in another format": lambda i: i.clone(memory_format=torch.contiguous_format),
    "contiguous": lambda i: i.contiguous(memory_format=torch.channels_last),
    "detach": lambda i: i.detach(),
    "data": lambda i: i.data,
    "index": lambda i: i[0, 1],
    "index by itself": lambda i: torch.arange(2000)[i],
    "slice": lambda i: i[..., ::2],
    "mask": lambda i: i[i > 20],
    "compare": lambda i: (i == i.flip(0), i != 3, i < 9, 9 >= i),
    "equal": lambda i: (torch.equal(i, both()[2]), torch.equal(both()[2], i), torch.equal(i, both()[2] + 1)),
    "arithmetic": lambda i: (i + 1, 1 + i, i * i, i // 12, i % 12, -i, i / 2, 2.5 * i),
    "reduce": lambda i: (i.sum(), i.max(), i.amin(1), i.unique(), i.float().mean()),
    "cat and stack": lambda i: (torch.cat([i, i]), torch.stack([i, i + 1]), torch.where(i > 5, i, 0)),
    "views": lambda i: (i.flatten(2), i.permute(1, 0, 2, 3), i.unsqueeze(0), i.mT, i.expand(5, *i.shape)),
    "gather": lambda i: torch.arange(2 * 3 * 99).view(2, 3, 99).gather(2, i.flatten(2)),
    "like": lambda i: (torch.zeros_like(i), i.new_ones(3), torch.ones_like(i, dtype=torch.uint8)),
    "shape": lambda i: (i.shape, i.size(2), i.dim(), i.numel(), len(i), i.nelement(), i.ndim),
    "strides": lambda i: (i.stride(), i.stride(1), i.is_contiguous(), i.storage_offset()),
    "kind": lambda i: (i.dtype, i.device, i.layout, i.requires_grad, i.is_leaf, i.type(), i.itemsize, i.nbytes),
    "is a tensor": lambda i: (isinstance(i, torch.Tensor), isinstance(i, torch.LongTensor), torch.is_tensor(i)),
    "predicates": lambda i: (i.is_floating_point(), i.is_signed(), i.is_cuda, i.is_sparse, i.is_inference()),
    "repr": repr,
    "str and format": lambda i: (str(i), f"{i}", f"{i[0, 0, 0, 0]}"),
    "item": lambda i: (i[0, 0, 0, 0].item(), int(i[1, 2, 3, 4]), bool(i[0, 0, 0, 0])),
    "tolist": lambda i: i.tolist(),
    "iterate": lambda i: list(i),
    "numpy": lambda i: (i.numpy(), np.asarray(i), np.array(i), i.numpy(force=True)),
    "dlpack": lambda i: torch.from_dlpack(i),
    "hooks": after_hooks,
    "buffer": as_buffer,
    "unpool": unpooled_by_stock,
    "unpool without a batch": lambda i: F.max_unpool2d(i[0].float(), i[0], **POOL),
    "one hot": lambda i: F.one_hot(i % 4),
    "out": lambda i: torch.add(i, 1, out=torch.empty(0, dtype=torch.int64)),
    "copy": lambda i: torch.empty(i.shape, dtype=torch.int32).copy_(i),
    "tree_map": lambda i: torch.utils._pytree.tree_map(lambda leaf: leaf.half(), {"indices": [i]})["indices"],
    "share": lambda i: i.share_memory_(),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("use", USES)
def test_every_use_gives_what_stocks_indices_give(use, layout):
    _, ours, stock = both(layout)
    expected = USES[use](stock)
    assert same(USES[use](ours), expected)
    assert same(USES[use](ours), expected)  # the int64 tensor now exists and is kept


RANDOM = {name for name in dir(torch.Tensor) if name.startswith(("bernoulli", "multinomial", "rand"))} | {
    "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_",
}  # fmt: skip
UNINITIALISED = {"new", "new_empty", "new_empty_strided", "empty_like"}
IDENTITY = {"data_ptr", "const_data_ptr", "__hash__", "__sizeof__", "__dir__"}
OF_THE_CLASS = {
    "__class__", "__doc__", "__module__", "__init_subclass__", "__subclasshook__", "__getstate__", "__deepcopy__",
    "__reduce__", "__reduce_ex__",
}  # fmt: skip
DOCUMENTED = {"untyped_storage", "storage"} | {
    "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_",
    "resize_as_sparse_",
}  # fmt: skip
NO_STRIDES = {name for name in dir(torch.Tensor) if name.startswith("to_sparse")} | {"chalf"}
METHODS = [
    name
    for name in dir(torch.Tensor)
    if name.startswith("__") or not name.startswith("_")
    if name not in RANDOM | UNINITIALISED | IDENTITY | OF_THE_CLASS | DOCUMENTED | NO_STRIDES
]
ARGUMENTS = [(), (1,), (1, 2), (torch.float32,), (torch.tensor([0, 1]),), ("the indices themselves",)]


def outcome(indices, name, arguments):
    try:
        member = getattr(indices, name)
        return member(*(indices if isinstance(entry, str) else entry for entry in arguments))
    except Exception as error:
        return type(error)


def agree(one, two):
    if isinstance(one, torch.Tensor) and (one.is_floating_point() or one.is_complex()):
        one, two = (torch.where(value == value, value, 77) for value in (one, two))  # NaN equals NaN
    comparable = (torch.Tensor, np.ndarray, int, float, str, tuple, list, type, type(None), torch.dtype)
    return same(one, two) if isinstance(one, comparable) else type(one) is type(two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_method_of_a_tensor_gives_and_does_what_it_does_to_stocks_indices(arguments):
    wrong = []
    for name in METHODS:
        _, ours, stock = both()
        if not agree(*(outcome(indices, name, arguments) for indices in (ours, stock))) or not same(ours, stock):
            wrong.append(name)
    assert not wrong and len(METHODS) > 500


CHANGES = {
    "in place": lambda i: i.add_(1),
    "through an alias": lambda i: i.detach().mul_(2),
    "through data": lambda i: i.data.fill_(3),
    "by index": lambda i: i.__setitem__((0, slice(None), 1), 5),
    "through a view": lambda i: i[1].zero_(),
    "through an older view": lambda i: i.view(-1)[3:7].clamp_(max=4),
    "as out": lambda i: torch.mul(i, 3, out=i),
    "foreach": lambda i: torch._foreach_add_([i], 2),
    "through numpy": lambda i: i.numpy().fill(1),
    "copy_": lambda i: i.copy_(torch.ones_like(i)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [lambda i: None, lambda i: i.float(), lambda i: i.detach(), lambda i: i[0]])
def test_changes_in_place_are_seen_by_everybody(change, before):
    _, ours, stock = both()
    others = before(ours), before(stock)
    for indices in (ours, stock):
        CHANGES[change](indices)
    assert same(ours, stock) and same(ours + 1, stock + 1)
    assert others[0] is None or same(*others)
    assert same(*(indices.clone() for indices in (ours, stock)))
    assert same(copy.deepcopy(ours), stock) and same(pickle.loads(pickle.dumps(ours)), stock)
    assert not ours.is_compact


def test_our_unpooling_follows_a_change():
    """Also to an index that is no tap of its window."""
    values, ours, stock = both()
    for indices in (ours, stock):
        indices[0, 0, 0, 0] = 90
    assert torch.equal(max_unpool2d(values, ours, **POOL), F.max_unpool2d(values, stock, **POOL))
    with pytest.raises(RuntimeError, match="indices holds 90; allowed: the taps of its window"):
        ours.offsets


@pytest.mark.parametrize("access", [torch.utils.dlpack.to_dlpack, lambda i: torch.Tensor.apply_(i, int)])
def test_code_in_c_that_asks_for_the_memory_gets_an_error_not_a_null_pointer(access):
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        access(both()[1])


def test_changing_the_shape_in_place_is_refused():
    with pytest.raises(RuntimeError, match="PoolIndices: aten.unsqueeze_.default changes their shape in place"):
        both()[1].unsqueeze_(0)


COMPACT_USES = {
    "detach": lambda i: i.detach(),
    "clone": lambda i: i.clone(),
    "to a device": lambda i: i.to("cpu", copy=True),
    "long": lambda i: i.long(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda i: pickle.loads(pickle.dumps(i)),
    "in inference mode": torch.inference_mode()(lambda i: i.clone()),
}


@pytest.mark.parametrize("use", COMPACT_USES)
def test_what_stays_compact(use):
    values, ours, stock = both()
    found = COMPACT_USES[use](ours)
    assert isinstance(found, PoolIndices) and found.is_compact and found._flat_content is None
    assert found.offsets.dtype == torch.uint8 and same(found.geometry, ours.geometry)
    assert torch.equal(max_unpool2d(values, found, **POOL), F.max_unpool2d(values, stock, **POOL))
    assert same(found.to_flat(), stock)


def test_collectives_write_to_them(tmp_path):
    """Their schema does not declare it: afterwards only the int64 tensor may remain."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        _, ours, stock = both()
        torch.distributed.broadcast(ours, 0)
        assert same(ours, stock) and not ours.is_compact
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_does_not_follow_and_an_alias_does():
    _, ours, stock = both()
    copied, alias = copy.deepcopy(ours), copy.copy(ours)
    ours.zero_()
    assert same(copied.to_flat(), stock) and not alias.any()


def test_torch_save_loads_safely():
    _, ours, stock = both()
    file = io.BytesIO()
    torch.save({"indices": ours, "changed": both()[1].add_(1)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["indices"]).__module__ == "fastseg.ops"  # so that the files below it may move
    assert loaded["indices"].is_compact and same(loaded["indices"], stock) and same(loaded["changed"], stock + 1)


def test_memory_is_one_byte_per_element_until_int64_is_asked_for():
    _, ours, _ = both()
    assert ours._flat_content is None
    ours.float()
    first = ours._flat_content
    ours.double()
    assert ours.is_compact and ours._flat_content is first


def test_flat_indices_made_in_inference_mode_serve_autograd_later():
    _, ours, stock = both()
    with torch.inference_mode():
        ours.float()
    assert same(unpooled_by_stock(ours), unpooled_by_stock(stock))


def test_the_pools_geometry_is_an_attribute_beside_torchs_methods():
    _, ours, stock = both()
    assert ours.stride == (2, 2) and ours.stride() == stock.stride() and ours.stride(-2) == stock.stride(-2)
    assert (ours.kernel_size, ours.padding, ours.dilation, ours.input_size) == ((3, 3), (1, 1), (1, 1), (9, 11))
    assert ours.geometry == ((3, 3), (2, 2), (1, 1), (1, 1))


def test_without_a_batch():
    values, ours, stock = both(shape=SHAPE[1:])
    assert same(ours.to_flat(), stock) and same(ours + 1, stock + 1)
    assert torch.equal(max_unpool2d(values, ours, **POOL), F.max_unpool2d(values, stock, **POOL))


OFFSETS = torch.zeros(1, 2, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(offsets=OFFSETS.long()), RuntimeError, "PoolIndices: offsets has dtype int64; allowed: uint8"),
        (dict(offsets=[0]), TypeError, "PoolIndices: offsets is list"),
        (dict(offsets=OFFSETS[0, 0]), RuntimeError, r"PoolIndices: offsets has shape \(4, 6\)"),
        (
            dict(input_size=(8, 9)),
            RuntimeError,
            r"PoolIndices: input_size=\(8, 9\); allowed: one from which a pool with",
        ),
        (dict(input_size=(10, 12)), RuntimeError, r"input_size=\(10, 12\)"),
        (dict(input_size=(-8, 12)), RuntimeError, r"input_size=\(-8, 12\)"),
        (dict(input_size=(2**70, 12)), RuntimeError, "input_size="),
        (dict(input_size=(8, 12, 3)), TypeError, r"input_size=\(8, 12, 3\); allowed: \(H, W\), two ints"),
        (dict(input_size=(8.0, 12)), TypeError, r"input_size=\(8.0, 12\)"),
        (dict(input_size=8), TypeError, "input_size=8"),
        (dict(kernel_size=16), RuntimeError, r"kernel_size=\(16, 16\) has 256 taps; allowed: at most 255"),
        (dict(stride=(0, 1)), RuntimeError, r"PoolIndices: stride=\(0, 1\); allowed: 1 or more"),
        (dict(dilation="2"), TypeError, "PoolIndices: dilation='2'"),
    ],
)
def test_bad_arguments_are_named_without_a_path_of_the_build(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        PoolIndices(**{"offsets": OFFSETS, "input_size": (8, 12), "kernel_size": 2, **arguments})
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize("size", [(8, 12), (9, 13), (7, 11)])
def test_every_size_that_gives_these_windows_is_taken(size):
    """With ceil_mode and without."""
    assert PoolIndices(OFFSETS, size, 2).input_size == size


class UnpoolAndUse(torch.nn.Module):
    def forward(self, values, indices):
        return max_unpool2d(values, indices, **POOL), indices.float() + 1, indices.flatten(2), indices.to_flat()


class PoolAndUse(torch.nn.Module):
    def forward(self, image):
        values, indices = max_pool2d(image, **POOL, return_indices=True, index_format="compact")
        return *UnpoolAndUse()(values, indices), indices


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("module", [PoolAndUse(), UnpoolAndUse()])
def test_in_compiled_graphs_they_are_made_taken_used_and_returned(module, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in (SHAPE, (2, 3, 11, 9)):
        arguments = both(shape=shape)[:2] if isinstance(module, UnpoolAndUse) else [torch.randn(shape)]
        assert same(compiled(*arguments), module(*arguments))


def test_a_change_in_place_in_a_graph_is_refused():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="changes them in place in a traced graph"):
        torch.compile(lambda i: i.add_(1), backend="aot_eager", fullgraph=True)(both()[1])


class Make(torch.nn.Module):
    def __init__(self, use=lambda indices: indices):
        super().__init__()
        self.use = use

    def forward(self, image):
        values, indices = max_pool2d(image, **POOL, return_indices=True, index_format="compact")
        return max_unpool2d(values, indices, output_size=image.shape), self.use(indices)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("finish", [lambda it: it, saved_and_loaded, lambda it: it.run_decompositions()])
def test_exported_programs_return_them_for_any_size(finish, strict):
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = finish(torch.export.export(Make(), (torch.randn(SHAPE),), dynamic_shapes=shapes, strict=strict))
    image = torch.randn(3, 3, 15, 20)
    output, indices = program.module()(image)
    expected, others = Make()(image)
    assert isinstance(indices, PoolIndices) and indices.is_compact and same(indices, others) and same(output, expected)


def test_exported_programs_take_them():
    values, ours, stock = both()
    program = torch.export.export(UnpoolAndUse(), (values, ours))
    other = PoolIndices.from_flat(stock.flip(0), SHAPE, **POOL)
    for module in (program.module(), saved_and_loaded(program).module()):
        assert same(module(values, other), UnpoolAndUse()(values, other))


def test_other_ops_in_an_exported_program_are_refused_unless_flat():
    with pytest.raises(RuntimeError, match="in an exported program they may only be unpooled with or returned"):
        torch.export.export(Make(lambda indices: indices + 1), (torch.randn(SHAPE),))
    image = torch.randn(SHAPE)
    program = torch.export.export(Make(lambda indices: indices.to_flat() + 1), (image,))
    assert same(program.module()(image)[1], F.max_pool2d(image, **POOL, return_indices=True)[1] + 1)
