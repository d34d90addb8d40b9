"""Every public op in forward mode, under torch.func and with meta tensors."""

import pytest
import torch
from torch.autograd import forward_ad

from fastseg import ops
from fastseg._op import REGISTRY, BackendError
from tests.contract import Make, leaves
from tests.test_contract import CASES, DIFFERENTIABLE_FIRST, SMALL


def _as_function_of_leaves(contract, case, make):
    """(function of the leaves that returns the sum of the floating outputs, the leaves)."""
    arguments = case.arguments(make)
    wanted = leaves(arguments)

    def function(*tensors):
        result = contract.function(**{**arguments, **dict(zip(wanted, tensors))})
        outputs = result if isinstance(result, tuple) else (result,)
        return sum(output.sum() for output in outputs if output.is_floating_point())

    return function, tuple(leaf.detach() for leaf in wanted.values())


@pytest.mark.parametrize("contract, case", SMALL)
def test_forward_mode(contract, case):
    function, tensors = _as_function_of_leaves(contract, case, Make(torch.float64))
    inputs = tuple(tensor.requires_grad_() for tensor in tensors if tensor.numel() > 0)
    if len(inputs) < max(1, len(tensors)):
        pytest.skip("nothing to differentiate in this case")
    options = dict(check_backward_ad=False, check_forward_ad=True, check_undefined_grad=False, fast_mode=True)
    assert torch.autograd.gradcheck(function, inputs, **options)


def test_forward_mode_is_refused_by_the_kernels():
    logits, labels = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, torch.ones_like(logits))
        with pytest.raises(BackendError, match="backend='cpu' in forward-mode .* allowed: auto, reference"):
            ops.cross_entropy(dual, labels, backend="cpu")


def test_a_backend_is_refused_only_where_derivatives_flow():
    """Not for a loss of constants inside a transform, even a nested one."""
    logits, labels, other = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), torch.randn(5)
    loss = ops.cross_entropy(logits, labels, backend="cpu")

    def with_constant(values):
        return values.square().sum() * ops.cross_entropy(logits, labels, backend="cpu")

    tangent = torch.func.jvp(with_constant, (other,), (torch.ones(5),))[1]
    torch.testing.assert_close(tangent, 2 * other.sum() * loss)
    torch.testing.assert_close(torch.func.hessian(with_constant)(other), 2 * loss * torch.eye(5))
    for nested in (torch.func.jacfwd, torch.func.grad):
        with pytest.raises(BackendError, match="nested torch.func differentiation; allowed: auto, reference"):
            nested(lambda x: torch.func.grad(lambda z: ops.cross_entropy(z, labels, backend="cpu"))(x).sum())(logits)


def _products(function, at, direction):
    """{name: second derivative times `direction`}, for every order of transforms."""
    func = torch.func

    def along(values):
        return (func.grad(function)(values) * direction).sum()

    def forward(values):
        return func.jvp(function, (values,), (direction,))[1]

    yield "grad(grad)", func.grad(along)(at)
    yield "jvp(grad)", func.jvp(func.grad(function), (at,), (direction,))[1]
    yield "vjp(grad)", func.vjp(func.grad(function), at)[1](direction)[0]
    yield "grad(jvp)", func.grad(forward)(at)
    yield "grad, then backward", _by_backward(function, at, direction)
    with forward_ad.dual_level():
        gradient = func.grad(function)(forward_ad.make_dual(at, direction))
        tangent = forward_ad.unpack_dual(gradient).tangent
        yield "grad of dual tensors", torch.zeros_like(at) if tangent is None else tangent
    if at.numel() < 300:
        for name, hessian in (("hessian", func.hessian), ("jacrev(jacrev)", lambda f: func.jacrev(func.jacrev(f)))):
            yield name, (hessian(function)(at).reshape(at.numel(), -1) @ direction.flatten()).view(at.shape)


def _by_backward(function, at, direction):
    at = at.clone().requires_grad_()
    gradient = torch.func.grad(function)(at)
    return torch.autograd.grad((gradient * direction).sum(), at)[0] if gradient.requires_grad else torch.zeros_like(at)


@pytest.mark.parametrize("limit", [0, 1 << 62], ids=["ours", "stock"])
@pytest.mark.parametrize("contract, case", DIFFERENTIABLE_FIRST)
def test_torch_func_of_second_order(contract, case, limit, monkeypatch):
    """All products equal PyTorch's, below and above the size threshold of stock."""
    for op in REGISTRY.values():
        for kind in op.stock.below if op.stock else ():
            monkeypatch.setitem(op.stock.below, kind, limit)
    arguments = case.arguments(Make(torch.float64))
    name, leaf = next(iter(leaves(arguments).items()))
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)

    def of_leaf(function):
        def squared(values):
            result = function(**{**arguments, name: values})
            outputs = result if isinstance(result, tuple) else (result,)
            return sum(output.square().sum() for output in outputs if output.is_floating_point())

        return squared

    plain = leaf.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(of_leaf(contract.stock)(plain), plain, create_graph=True)[0]
    expected = torch.autograd.grad((gradient * direction).sum(), plain)[0]
    for order, product in _products(of_leaf(contract.function), leaf.detach(), direction):
        torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-9, msg=lambda text: f"{order}: {text}")


@pytest.mark.parametrize("contract, case", DIFFERENTIABLE_FIRST)
def test_torch_func_grad(contract, case, device):
    """The gradient of backward; in a batch the gradients of its elements; forward over reverse."""
    function, tensors = _as_function_of_leaves(contract, case, Make(torch.float32, device))
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(function(*inputs), inputs)
    numbers = tuple(range(len(tensors)))
    for ours, backward in zip(torch.func.grad(function, numbers)(*tensors), expected):
        torch.testing.assert_close(ours, backward)
    batches = tuple(torch.stack([tensor, tensor]) for tensor in tensors)
    for ours, backward in zip(torch.func.vmap(torch.func.grad(function, numbers))(*batches), expected):
        torch.testing.assert_close(ours, torch.stack([backward, backward]))


@pytest.mark.parametrize("contract, case", CASES)
def test_meta_tensors(contract, case):
    """Shapes and dtypes without data, as in stock's ops, forward and backward."""
    if not contract.compile_whole:
        pytest.skip("the result depends on data")
    arguments = case.arguments(Make(torch.float32))
    on_meta = {
        name: (
            value.detach().to("meta").requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        )
        for name, value in arguments.items()
    }
    expected, outputs = contract.function(**arguments), contract.function(**on_meta)
    expected, outputs = ((value,) if isinstance(value, torch.Tensor) else value for value in (expected, outputs))
    for ours, real in zip(outputs, expected):
        assert ours.device.type == "meta"
        assert (ours.shape, ours.dtype, ours.requires_grad) == (real.shape, real.dtype, real.requires_grad)
    for name, leaf in leaves(on_meta).items():
        if outputs[0].requires_grad:
            (gradient,) = torch.autograd.grad(outputs[0].sum(), leaf, retain_graph=True)
            assert gradient.device.type == "meta" and gradient.shape == arguments[name].shape


PER_IMAGE = {  # function, size of the labels of (2, 3, 2, 2) logits
    "cross_entropy": (ops.cross_entropy, (2, 2, 2)),
    "focal_loss": (ops.focal_loss, (2, 2, 2)),
    "dice_loss": (ops.dice_loss, (2, 2, 2)),
    "cross_entropy_dice": (ops.cross_entropy_dice, (2, 2, 2)),
    "binary_cross_entropy_dice": (lambda x, y: ops.binary_cross_entropy_dice(x, y % 2), (2, 3, 2, 2)),
    "upsample_cross_entropy": (ops.upsample_cross_entropy, (2, 4, 4)),
    "upsample_cross_entropy_dice": (ops.upsample_cross_entropy_dice, (2, 4, 4)),
    "max_unpool2d": (lambda x, y: (ops.max_unpool2d(x, y, 2) ** 3).sum(), (2, 3, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", PER_IMAGE)
def test_second_derivatives_of_each_of_a_batch_with_its_labels(name):
    """Labels in a batch of vmap cannot be read: a reference does not try."""
    function, size = PER_IMAGE[name]
    logits = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    labels = torch.randint(3, (2, *size))
    for twice in (torch.func.hessian, lambda function: torch.func.jacrev(torch.func.jacrev(function))):
        found = torch.func.vmap(twice(function))(logits, labels)
        torch.testing.assert_close(found, torch.stack([twice(function)(*each) for each in zip(logits, labels)]))
