"""Which poolings of somebody's model may return compact indices: those that provably nobody but an unpooling sees.

The model is traced symbolically (torch.fx), in training and in evaluation mode. A pooling gets compact
indices if in both traces every use of its indices, wherever the module is called, is as the indices of an
unpooling. Where the model cannot be traced nothing is known of it, and int64 stays. What a trace cannot see
is what the model's `forward` does not do: a caller who takes the pooling out of the model and calls it
himself gets `fastseg.ops.PoolIndices`.
"""

import copy
import operator

from torch import fx, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST_COMPACT_TAPS = 255


class _Tracer(fx.Tracer):
    """Every pooling and unpooling is a leaf, as torch's own are."""

    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, (nn.MaxPool2d, nn.MaxUnpool2d)) or super().is_leaf_module(module, qualified_name)


def compact_where_safe(model, replaced):
    """Gives poolings among ``replaced`` compact indices where that is safe; notes by module on which, or why not."""
    pools = [module for module in replaced if isinstance(module, nn.MaxPool2d) and module.return_indices]
    if not pools:
        return {}
    traces, failure = _traces(model)
    notes = {}
    for pool in pools:
        reason = failure or _why_not_alone(pool) or _why_not_in(model, pool, traces, replaced)
        if reason is None:
            pool.index_format = "compact"
        notes[pool] = "compact indices" if reason is None else f"int64 indices: {reason}"
    return notes


def _traces(model):
    """(graphs of the model in training and in evaluation mode, None) or (None, why there are none)."""
    shared = {id(parameter): parameter for parameter in model.parameters()}  # not worth a copy
    graphs = []
    for training in (True, False):
        try:
            traced = copy.deepcopy(model, dict(shared))  # tracing runs the model's own code, which may leave traces
            graphs.append(_Tracer().trace(traced.train(training)))
        except Exception as error:  # whatever somebody's forward does not like about being traced
            message = str(error).strip().partition("\n")[0]
            return None, f"torch.fx cannot trace the model ({type(error).__name__}: {message})"
    return graphs, None


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _why_not_alone(pool):
    if any(getattr(pool, hooks) for hooks in _HOOKS):
        return "it has hooks"
    kernel = _pair(pool.kernel_size)
    if kernel[0] * kernel[-1] > _MOST_COMPACT_TAPS:
        return f"its window has more than {_MOST_COMPACT_TAPS} taps"
    if _pair(pool.dilation) != (1, 1):
        return "its windows are dilated, and may then hold no pixel at all"
    return None


def _why_not_in(model, pool, traces, replaced):
    """The first use of the indices that is not an unpooling's, or None."""
    called = False
    for graph in traces:
        for node in graph.nodes:
            if node.op != "call_module" or model.get_submodule(node.target) is not pool:
                continue
            called = True
            for user in node.users:
                if user.op != "call_function" or user.target is not operator.getitem or user.args[1] not in (0, 1):
                    return f"its pair (output, indices) goes to {_describe(model, user)} as a whole"
                uses = user.users if user.args[1] == 1 else {}
                reasons = (_why_not_used(model, pool, user, use, replaced) for use in uses)
                reason = next(filter(None, reasons), None)
                if reason is not None:
                    return reason
    return None if called else "the model's forward does not call it"


def _why_not_used(model, pool, indices, user, replaced):
    unpool = model.get_submodule(user.target) if user.op == "call_module" else None
    if not isinstance(unpool, nn.MaxUnpool2d):
        return f"its indices go to {_describe(model, user)}"
    if not any(unpool is module for module in replaced):
        return f"its indices go to the unpooling {user.target}, which was not replaced"
    if any(getattr(unpool, hooks) for hooks in _HOOKS):
        return f"the unpooling {user.target} has hooks"
    arguments = dict(zip(("input", "indices", "output_size"), user.args)) | user.kwargs
    if any(value is indices for name, value in arguments.items() if name != "indices"):
        return f"its indices go to the unpooling {user.target}, but not as indices"
    sizes = ("kernel_size", "stride", "padding")
    if any(_pair(getattr(pool, size)) != _pair(getattr(unpool, size)) for size in sizes):
        return f"the unpooling {user.target} has another kernel, stride or padding"
    return None


def _describe(model, node):
    if node.op == "output":
        return "the model's output"
    if node.op == "call_module":
        return f"the {type(model.get_submodule(node.target)).__name__} {node.target}"
    return f"{node.op} {getattr(node.target, '__name__', node.target)}"
