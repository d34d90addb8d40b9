"""max_pool2d with indices: forward, and backward for a given gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Inputs, Peer, Target, differentiable
from fastseg.testing import assert_within_policy


class Receive(torch.autograd.Function):
    """A scalar that takes no time to compute; its gradient with respect to `output` is `gradient`."""

    @staticmethod
    def forward(ctx, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx, grad_scalar: Tensor):
        return ctx.saved_tensors[0], None


@torch.compiler.disable
def receive(output: Tensor, gradient: Tensor) -> Tensor:
    """Outside the graphs of a compiled peer: without a use of the output, the compiler would not compute it."""
    return Receive.apply(output, gradient)


def maker(pool: dict):
    """Inputs of a pooling: the image and the gradient of the output."""

    def make(shape, device, dtype, layout):
        image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
        return image, torch.randn_like(F.max_pool2d(image, **pool))

    return make


def ours(pool: dict, index_format: str):
    def run(image, gradient):
        output, _ = fastseg.ops.max_pool2d(image, **pool, return_indices=True, index_format=index_format)
        return receive(output, gradient)

    return run


def stock(pool: dict):
    def run(image, gradient):
        output, _ = F.max_pool2d(image, **pool, return_indices=True)
        return receive(output, gradient)

    return run


def minimal_bytes(pool: dict, index_bytes: int):
    """Image and gradient of the output read, output and gradient of the image written, indices both."""

    def count(shape, dtype):
        image = torch.empty(shape, device="meta")
        pooled = F.max_pool2d(image, **pool).numel()
        return 2 * dtype.itemsize * (image.numel() + pooled) + 2 * index_bytes * pooled

    return count


def verifier(pool: dict, index_format: str):
    """Output and indices equal to stock's, the gradient within the policy."""

    def verify(case: Case, inputs: Inputs) -> str | None:
        with torch.no_grad():
            expected, indices = F.max_pool2d(inputs[0], **pool, return_indices=True)
            output, found = fastseg.ops.max_pool2d(inputs[0], **pool, return_indices=True, index_format=index_format)
        found = found if index_format == "flat" else found.to_flat()
        if not torch.equal(output, expected) or not torch.equal(found, indices):
            return "output or indices differ from stock's"
        gradients = []
        for function, arguments in ((case.ours, inputs), (stock(pool), inputs), (stock(pool), in_double(inputs))):
            arguments = differentiable(arguments, backward=True)
            function(*arguments).backward()
            gradients.append(arguments[0].grad)
        try:
            assert_within_policy(*gradients, "gradient")
        except AssertionError as error:
            return str(error)
        return None

    return verify


SEGNET = dict(kernel_size=2)
RESNET = dict(kernel_size=3, stride=2, padding=1)


def case(shape, pool=SEGNET, index_format="compact", name="", **options):
    compact = index_format == "compact"
    other = "flat" if compact else "compact"
    others = {f"fastseg {other}": Peer(ours(pool, other), ours=True)}
    return Case(
        "max_pool2d", shape, maker(pool), ours(pool, index_format), peers.stock(stock(pool)) | others,
        minimal_bytes(pool, 1 if compact else 8), verifier(pool, index_format),
        name=" ".join(filter(None, [name, "" if compact else "int64 indices"])), **options,
    )  # fmt: skip


BIG, SMALL = (4, 64, 360, 480), (4, 256, 90, 120)
COMPACT_TARGETS = (
    Target("speedup", 8, "eager"),
    Target("speedup", 1.3, "eager channels_last"),
    Target("bandwidth", 0.85, allocator="default", device="cuda"),
)
CASES = [
    case(BIG, targets=COMPACT_TARGETS),
    case(SMALL, targets=COMPACT_TARGETS),
    case(BIG, layout="channels_last", targets=(Target("speedup", 1, "eager channels_last"),)),
    case(SMALL, layout="channels_last", targets=(Target("speedup", 1, "eager channels_last"),)),
    case(BIG, index_format="flat", targets=(Target("speedup", 1, "eager"),)),
    case(BIG, index_format="flat", layout="channels_last", targets=(Target("speedup", 1, "eager channels_last"),)),
    case(BIG, dtype=torch.bfloat16),
    case((8, 64, 112, 112), RESNET, name="k3s2p1"),
    case((8, 64, 112, 112), RESNET, name="k3s2p1", layout="channels_last"),
]
