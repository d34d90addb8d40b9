"""Every public op x case against the op contract: see CONTRIBUTING.md and tests/contract.py."""

import importlib
import pkgutil
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tests.ops
from fastseg import _library
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract, Make, leaves, to_double

CONTRACTS = [
    contract
    for module in pkgutil.iter_modules(tests.ops.__path__, "tests.ops.")
    for contract in getattr(importlib.import_module(module.name), "CONTRACTS", [])
]
CASES = [
    pytest.param(contract, case, id=f"{contract.name}-{case.name}") for contract in CONTRACTS for case in contract.cases
]
DIFFERENTIABLE = [parameter for parameter in CASES if not parameter.values[0].exact]
SMALL = [parameter for parameter in DIFFERENTIABLE if parameter.values[1].small]
FIRST = [pytest.param(contract, contract.cases[0], id=contract.name) for contract in CONTRACTS]
DIFFERENTIABLE_FIRST = [parameter for parameter in FIRST if not parameter.values[0].exact]


def _outputs(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _run(function, arguments: dict, grad_layout: str = "random"):
    """(outputs, {leaf name: gradient}) of one call; grad_layout: the layout of the output's gradient."""
    outputs = _outputs(function(**arguments))
    wanted = leaves(arguments)
    differentiable = [output for output in outputs if output.requires_grad]
    if not wanted or not differentiable:
        return outputs, {}
    gradients = [_grad_output(output, grad_layout) for output in differentiable]
    found = torch.autograd.grad(differentiable, list(wanted.values()), gradients, allow_unused=True)
    return outputs, dict(zip(wanted, found))


def _grad_output(output: torch.Tensor, layout: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if layout == "stride0":  # the gradient of .sum()
        return torch.full((), 0.75, dtype=output.dtype, device=output.device).expand(output.shape)
    shape = (*output.shape[:-1], 2 * output.shape[-1]) if layout == "sliced" and output.dim() else output.shape
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)  # exact in every dtype
    values = values.to(output.device, output.dtype)
    return values[..., ::2] if layout == "sliced" and output.dim() else values


def _compare(contract: Contract, case: Case, make: Make, grad_layout: str = "random", **options):
    arguments = case.arguments(make)
    ours, our_gradients = _run(lambda **kw: contract.function(**kw, **options), arguments, grad_layout)
    stock, stock_gradients = _run(contract.stock, arguments, grad_layout)
    assert len(ours) == len(stock)
    if contract.exact:
        for ours_one, stock_one in zip(ours, stock):
            assert ours_one.dtype == stock_one.dtype
            assert torch.equal(ours_one, stock_one)
        return
    exact, exact_gradients = _run(contract.stock, to_double(arguments), grad_layout)
    for ours_one, stock_one, exact_one in zip(ours, stock, exact):
        assert_within_policy(ours_one, stock_one, exact_one)
    for name, gradient in our_gradients.items():
        assert gradient is not None, f"no gradient for {name}"
        assert_within_policy(gradient, stock_gradients[name], exact_gradients[name], f"gradient of {name}")
        leaf = arguments[name]
        if leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last):
            assert gradient.is_contiguous(memory_format=torch.channels_last), f"gradient of {name} lost channels_last"


@pytest.mark.sanitized
@pytest.mark.parametrize("contract, case", CASES)
def test_matches_stock_in_every_dtype(contract, case, device):
    for dtype in contract.dtypes:
        if not (device == "cuda" and dtype == torch.float64):
            _compare(contract, case, Make(dtype, device))


@pytest.mark.sanitized
@pytest.mark.parametrize("contract, case", CASES)
def test_matches_stock_in_every_layout(contract, case, device):
    for layout in contract.layouts:
        _compare(contract, case, Make(torch.float32, device, layout))


@pytest.mark.sanitized
@pytest.mark.parametrize("contract, case", DIFFERENTIABLE)
def test_gradient_layouts(contract, case, device):
    for grad_layout in ("stride0", "sliced"):
        _compare(contract, case, Make(torch.float32, device), grad_layout)


@pytest.mark.parametrize("contract, case", CASES)
def test_reference_backend(contract, case, device):
    _compare(contract, case, Make(torch.float32, device), backend="reference")


@pytest.mark.parametrize("contract, case", FIRST)
def test_tensors_made_in_inference_mode(contract, case, device):
    def run():
        with torch.no_grad():
            return _outputs(contract.function(**case.arguments(Make(torch.float32, device))))

    expected = run()
    with torch.inference_mode():
        outputs = run()
    for one, two in zip(outputs, expected, strict=True):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


@pytest.mark.parametrize("contract, case", SMALL)
def test_gradcheck(contract, case):
    arguments = case.arguments(Make(torch.float64))
    wanted = leaves(arguments)
    if not wanted or any(leaf.numel() == 0 for leaf in wanted.values()):
        pytest.skip("nothing to differentiate in this case")

    def function(*tensors):
        return contract.function(**{**arguments, **dict(zip(wanted, tensors))})

    inputs = tuple(wanted.values())
    assert torch.autograd.gradcheck(function, inputs)
    if contract.double_backward:
        assert torch.autograd.gradgradcheck(function, inputs)


class _Recorder(TorchDispatchMode):
    """Records the fastseg ops that a call reaches, with their arguments: the public ones, or the C++ kernels."""

    def __init__(self, kernels: bool = False):
        super().__init__()
        self.kernels = kernels
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "fastseg" and name.startswith("_") == self.kernels:
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("contract, case", FIRST)
def test_opcheck(contract, case, device):
    with _Recorder() as recorder:
        _run(contract.function, case.arguments(Make(torch.float32, device)))
    assert recorder.calls, "the call reached no fastseg op"
    for function, args in recorder.calls.items():
        lead = args[0].detach()
        lead = lead.clone().requires_grad_() if lead.is_floating_point() else lead
        torch.library.opcheck(function, (lead, *args[1:]))


@pytest.mark.sanitized
@pytest.mark.skipif(_library.CPU_LEVEL is None, reason="needs a compiled library")
@pytest.mark.parametrize("contract, case", FIRST)
def test_kernels_refuse_lists_that_are_too_short(contract, case):
    with _Recorder(kernels=True) as recorder:
        _run(contract.function, case.arguments(Make(torch.float32, "cpu")))
    for kernel, args in recorder.calls.items():
        for place, argument in enumerate(args):
            if isinstance(argument, (list, tuple)) and argument and not isinstance(argument[0], torch.Tensor):
                for shorter in ([], argument[:-1]):
                    with pytest.raises(RuntimeError):
                        kernel(*args[:place], shorter, *args[place + 1 :])


@pytest.mark.parametrize("contract, case", CASES)
def test_deterministic(contract, case, device):
    """Two runs are bitwise equal, also if uninitialised memory is filled with NaN."""
    make_arguments = lambda: case.arguments(Make(torch.float32, device))  # noqa: E731
    first_outputs, first_gradients = _run(contract.function, make_arguments())
    torch.use_deterministic_algorithms(True)
    try:
        outputs, gradients = _run(contract.function, make_arguments())
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first_outputs, outputs):
        assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
    for name in gradients:
        assert torch.equal(first_gradients[name].nan_to_num(7.0), gradients[name].nan_to_num(7.0))


@pytest.mark.parametrize("contract, case", FIRST)
def test_compiles_to_one_graph(contract, case, device):
    if not contract.compile_whole:
        pytest.skip("the result's shape depends on data")
    torch._dynamo.reset()
    compiled = torch.compile(contract.function, fullgraph=True, dynamic=True)
    for seed in (0, 1):
        arguments = case.arguments(Make(torch.float32, device, seed=seed))
        outputs, gradients = _run(compiled, arguments)
        eager_outputs, eager_gradients = _run(contract.function, arguments)
        if contract.exact:
            for one, two in zip(outputs, eager_outputs):
                torch.testing.assert_close(one, two)
            continue
        # Eager replaces stock: compiling may round in another order, but not worse.
        exact_outputs, exact_gradients = _run(contract.stock, to_double(arguments))
        for one, two, exact in zip(outputs, eager_outputs, exact_outputs):
            assert_within_policy(one, two, exact)
        for name in eager_gradients:
            assert_within_policy(gradients[name], eager_gradients[name], exact_gradients[name], name)


@pytest.mark.parametrize("contract, case", FIRST)
def test_autocast_gives_stocks_dtype(contract, case, device):
    arguments = case.arguments(Make(torch.bfloat16, device))
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, stock = _outputs(contract.function(**arguments)), _outputs(contract.stock(**arguments))
    assert [output.dtype for output in ours] == [output.dtype for output in stock]


@pytest.mark.parametrize("contract", [pytest.param(contract, id=contract.name) for contract in CONTRACTS])
def test_rejected_dtypes_are_named(contract, device):
    for dtype in contract.rejected:
        arguments = contract.cases[0].arguments(Make(torch.float32, device))
        for name in leaves(arguments):
            arguments[name] = arguments[name].detach().to(dtype)
        with pytest.raises((RuntimeError, TypeError), match=str(dtype).removeprefix("torch.")):
            contract.function(**arguments)


def test_unknown_backend_is_refused(device):
    for contract in CONTRACTS:
        with pytest.raises(ValueError, match="allowed: auto, stock, cpu, cuda, triton, reference"):
            contract.function(**contract.cases[0].arguments(Make(torch.float32, device)), backend="magic")


# --- what runs ---


def _kernels_of(function) -> set[str]:
    """The files of fastseg.kernels whose Python code a call runs, and "native" for C++ entry points.

    By the interpreter's and PyTorch's profilers, which do not depend on `Op`.
    """
    files = set()

    def note(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and "/kernels/" in path:
            files.add("triton" if "triton" in path.rpartition("/")[2] else path.rpartition("/")[2].removesuffix(".py"))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.key for event in profile.key_averages()}
    return files | {"native" for name in names if name.startswith("fastseg::_")}


@pytest.mark.parametrize("contract, case", DIFFERENTIABLE_FIRST)
def test_the_backend_of_the_forward_runs_the_backward(contract, case):
    def run(backend):
        return lambda: _run(lambda **kw: contract.function(**kw, backend=backend), case.arguments(Make(torch.float32)))

    assert _kernels_of(run("reference")) & {"reference", "native", "triton", "cpu"} <= {"reference"}
    ran = _kernels_of(run("cpu"))  # C++, or kernels/<op>/cpu.py
    assert ran & {"native", "cpu"} and not ran & {"reference", "triton"}


# Python calls of a forward with autograd: a GPU waits for them.
MAX_CALLS = 20
CALLS_OF_LONGER_OPS = {  # two ops, two gradients, or one more tensor to check
    "binary_cross_entropy_dice": 35, "cross_entropy_dice": 30, "dice_loss": 30, "probabilities": 25,
    "conv_transpose2d": 39, "dilated_conv2d": 38,  # 14 of them in kernels/convolution/cpu.py
    "roi_align": 34, "roi_pool": 32,  # two tensors, checked numbers
    "cross_entropy_pixel_weight": 22, "probabilities_pixel_weight": 32, "upsample_cross_entropy_dice": 22,
    "batched_nms_static": 22, "soft_nms": 22, "soft_nms_static": 24, "paste_masks": 25, "upsample_masks": 24,
}  # fmt: skip


PUBLIC_FIRST = [parameter for parameter in FIRST if parameter.values[0].function.__module__.startswith("fastseg")]


@pytest.mark.parametrize("contract, case", PUBLIC_FIRST)
def test_few_python_calls(contract, case):
    arguments = case.arguments(Make(torch.float32))
    contract.function(**arguments, backend="cpu")
    calls = []

    def note(frame, event, argument):
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        contract.function(**arguments, backend="cpu")
    finally:
        sys.setprofile(None)
    assert len(calls) <= CALLS_OF_LONGER_OPS.get(contract.name, MAX_CALLS), calls
