"""Every public op under what PyTorch does with ops besides plain backward: forward mode, torch.func, meta tensors."""

import pytest
import torch
from torch.autograd import forward_ad

from fastseg import ops
from fastseg._op import BackendError
from tests.contract import Make, leaves
from tests.test_contract import CASES, DIFFERENTIABLE_FIRST, SMALL


def _as_function_of_leaves(contract, case, make):
    """(function of the leaves that gives the sum of the floating outputs, the leaves)."""
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


@pytest.mark.parametrize("contract, case", DIFFERENTIABLE_FIRST)
def test_torch_func_grad(contract, case, device):
    """The same gradient as that of backward; of a batch the gradient of each of its elements; forward over reverse."""
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
    """Shapes and dtypes without data, as of stock's ops, forward and backward."""
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
