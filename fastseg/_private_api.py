"""All uses of PyTorch's private API, to be checked for each new version.

Checked on torch 2.11, 2.13 and 2.14.1 (`make test-torch VERSION=...`).
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction

_STANDARD_TYPES = (Tensor, torch.nn.Parameter, type(None))


# torch.nn.functional.cross_entropy of (input, target, weight, reduction, ignore_index, label_smoothing), where
# `reduction` is a number of fastseg._reduction.
stock_cross_entropy = torch._C._nn.cross_entropy_loss


# A __torch_function__ that does not convert results to the tensor subclass.
no_torch_function = torch._C._disabled_torch_function_impl

# Of a tensor without memory: C++ code that reads its data pointer gets an error instead of null.
refuse_data_pointer = torch._C._set_throw_on_mutable_data_ptr


def in_dispatch_mode() -> bool:
    """True under a TorchDispatchMode, such as a tracer."""
    return torch._C._len_torch_dispatch_stack() > 0


def must_dispatch(tensors: tuple) -> bool:
    """True if a mode, transform, profiler or tensor subclass must see a call with these tensors (or None).

    torch.compile cannot trace this function: test torch.compiler.is_compiling() first.
    """
    for tensor in tensors:  # a loop: a generator costs a microsecond more
        if type(tensor) not in _STANDARD_TYPES:
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
    )


def has_fixed_size(tensor: Tensor) -> bool:
    """False in a program that accepts other sizes of this tensor; torch.compile can trace this function."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # compilers have loaded it already

    return has_static_value(tensor.numel())


def is_traced() -> bool:
    """True while torch.jit.trace records a program."""
    return torch._C._get_tracing_state() is not None


def in_functional_transform() -> bool:
    """True inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def differentiates_twice(tensors: tuple) -> bool:
    """True if transforms of torch.func ask for more than one derivative of these tensors, or for a forward-mode one.

    Ignores a forward-mode transform that is the innermost one: `has_tangent` detects it exactly.
    """
    functorch = torch._C._functorch
    kinds = functorch.TransformType
    transforms = {transform.level(): transform.key() for transform in functorch.get_interpreter_stack()}
    if forward_ad._current_level >= 0 and kinds.Jvp not in transforms.values():
        return True  # dual tensors of forward_ad inside a transform
    innermost, reverse = max(transforms), set()
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            level = functorch.maybe_get_level(tensor)
            kind = transforms.get(level)
            if kind == kinds.Jvp and level != innermost:
                return True
            if kind == kinds.Grad and tensor.requires_grad:
                reverse.add(level)
            tensor = functorch.get_unwrapped(tensor)
    return len(reverse) > 1


def is_batched(tensor: Tensor) -> bool:
    """True for a batch of torch.func.vmap: its data cannot be read."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def has_tangent(args: tuple) -> bool:
    """True if forward-mode differentiation goes through a call with these arguments."""
    if forward_ad._current_level < 0:
        return False
    tensors = (value for value in args if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_last_backward() -> bool:
    """True in a backward after which the graph is freed: neither retain_graph=True nor torch.func."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


def apply_of(function: type[torch.autograd.Function]):
    """`function.apply` without its test for transforms of torch.func, for callers that have made this test."""
    return super(torch.autograd.Function, function).apply


def boxed_call_of(name: str):
    """The built-in function that `torch.ops.fastseg.<name>` calls."""
    return getattr(torch.ops.fastseg, name).default._op


# torch's pooling without its Python wrapper, and its unpooling without the limits of the wrapper on output_size.
max_pool2d_with_indices = torch._C._nn.max_pool2d_with_indices
max_unpool2d = torch._C._nn.max_unpool2d

# torch.nn.functional.interpolate(mode="bilinear") of (input, size, align_corners, scale_height, scale_width).
upsample_bilinear2d = torch._C._nn.upsample_bilinear2d


@functools.cache
def multiplies_halves(dtype: torch.dtype) -> bool:
    """True if this processor multiplies matrices of a half type; torch's convolution then uses these instructions."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.cpu._is_amx_fp16_supported()


def has_kernel(name: str, dispatch_key: str) -> bool:
    """True if a loaded library implements `fastseg::<name>` for "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseg::{name}", dispatch_key)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The `reduction` that torch's deprecated arguments mean."""
    return _reduction.legacy_get_string(size_average, reduce)


def keep(ctx, tensors: tuple, constant_outputs: tuple, materialize: bool) -> None:
    """save_for_backward, mark_non_differentiable and set_materialize_grads in one call."""
    ctx.to_save = tensors
    ctx.non_differentiable = constant_outputs
    ctx.materialize_grads = materialize
