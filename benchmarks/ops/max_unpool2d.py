"""max_unpool2d with the indices of a 2x2 pooling, and both together: forward, and backward for a given gradient. The
shape of a case is that of the image, the pool's input.
"""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks import peers
from benchmarks.checks import in_double
from benchmarks.harness import MEMORY_FORMATS, Case, Inputs, Peer, Target, differentiable
from benchmarks.ops.max_pool2d import receive
from fastseg.ops import PoolIndices
from fastseg.testing import assert_within_policy

KERNEL = 2


def make(shape, device, dtype, layout):
    """Pooled values, the gradient of the unpooled image, int64 indices and compact indices."""
    image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
    values, indices = F.max_pool2d(image, KERNEL, return_indices=True)
    return values, torch.randn_like(image), indices, PoolIndices.from_flat(indices, shape, KERNEL)


def make_pair(shape, device, dtype, layout):
    """The image, and the gradient of the result."""
    image = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])
    return image, torch.randn_like(image)


def stock(values, gradient, indices, compact):
    return receive(F.max_unpool2d(values, indices, KERNEL, output_size=gradient.shape), gradient)


def by_compact(values, gradient, indices, compact):
    return receive(fastseg.ops.max_unpool2d(values, compact, KERNEL, output_size=gradient.shape), gradient)


def by_flat(values, gradient, indices, compact):
    return receive(fastseg.ops.max_unpool2d(values, indices, KERNEL, output_size=gradient.shape), gradient)


def stock_pair(image, gradient):
    values, indices = F.max_pool2d(image, KERNEL, return_indices=True)
    return receive(F.max_unpool2d(values, indices, KERNEL, output_size=image.shape), gradient)


def our_pair(index_format):
    def run(image, gradient):
        values, indices = fastseg.ops.max_pool2d(image, KERNEL, return_indices=True, index_format=index_format)
        unpooled = fastseg.ops.max_unpool2d(values, indices, KERNEL, output_size=image.shape)
        return receive(unpooled, gradient)

    return run


def verifier(stock):
    """The gradient within the policy, and the unpooled image equal to stock's."""

    def verify(case: Case, inputs: Inputs) -> str | None:
        gradients = []
        for function, arguments in ((case.ours, inputs), (stock, inputs), (stock, in_double(inputs))):
            arguments = differentiable(arguments, backward=True)
            function(*arguments).backward()
            gradients.append(arguments[0].grad)
        values, indices = (
            (inputs[0], inputs[2]) if len(inputs) > 2 else F.max_pool2d(inputs[0], KERNEL, return_indices=True)
        )
        size = inputs[1].shape
        expected = F.max_unpool2d(values, indices, KERNEL, output_size=size)
        compact = PoolIndices.from_flat(indices, size, KERNEL)
        for ours in (indices, compact):
            if not torch.equal(fastseg.ops.max_unpool2d(values, ours, KERNEL, output_size=size), expected):
                return "the unpooled image differs from stock's"
        try:
            assert_within_policy(*gradients, "gradient")
        except AssertionError as error:
            return str(error)
        return None

    return verify


def unpool_bytes(index_bytes):
    """Values read and image written, gradient of the image read and that of the values written, indices twice."""

    def count(shape, dtype):
        image = torch.Size(shape).numel()
        return 2 * dtype.itemsize * (image + image // 4) + 2 * index_bytes * (image // 4)

    return count


def pair_bytes(shape, dtype):
    """Both ops forward and backward with one-byte indices."""
    image = torch.Size(shape).numel()
    return 4 * dtype.itemsize * (image + image // 4) + 4 * (image // 4)


def case(shape, ours=by_compact, name="", index_bytes=1, **options):
    others = {"fastseg flat": Peer(by_flat, ours=True)} if index_bytes == 1 else {}
    return Case(
        "max_unpool2d", shape, make, ours, peers.stock(stock) | others, unpool_bytes(index_bytes),
        verifier(stock), name=name, quick_shape=(1, shape[1], 44, 60), **options,
    )  # fmt: skip


def pair(shape, **options):
    others = {"fastseg flat": Peer(our_pair("flat"), ours=True)}
    return Case(
        "max_unpool2d", shape, make_pair, our_pair("compact"), peers.stock(stock_pair) | others, pair_bytes,
        verifier(stock_pair), name="pool and unpool", quick_shape=(1, shape[1], 44, 60), **options,
    )  # fmt: skip


BIG, SMALL = (4, 64, 360, 480), (4, 256, 90, 120)
UNPOOL_TARGETS = (
    Target("speedup", 1.8, "eager"),
    Target("speedup", 1.8, "eager channels_last"),
    Target("bandwidth", 0.85, allocator="default", device="cuda"),
)
PAIR_TARGETS = (Target("speedup", 1.8, "eager", allocator="default", device="cuda"),)
CASES = [
    case(BIG, targets=UNPOOL_TARGETS),
    case(SMALL, targets=UNPOOL_TARGETS),
    case(BIG, layout="channels_last", targets=(Target("speedup", 1, "eager channels_last"),)),
    case(BIG, by_flat, "int64 indices", 8, targets=(Target("speedup", 1, "eager"),)),
    case(
        BIG, by_flat, "int64 indices", 8, layout="channels_last", targets=(Target("speedup", 1, "eager channels_last"),)
    ),
    case(BIG, dtype=torch.bfloat16),
    pair(BIG, targets=PAIR_TARGETS),
    pair(BIG, layout="channels_last", targets=PAIR_TARGETS),
]
