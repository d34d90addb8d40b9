"""The CUDA kernels of max_unpool2d, run on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from tests.emulated.pool_cases import (
    CASES,
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    OVERLAPPING,
    TILED,
    Geometry,
    arranged,
    assert_same,
    compact,
    indices_of,
    numbers,
    poisoned,
    window_indices,
)

forward = torch.ops.fastseg_emulator._max_unpool2d
backward = torch.ops.fastseg_emulator._max_unpool2d_backward
UNKNOWN = ([], [], [], [])
HOSTILE = torch.tensor([-1, 35, 2**31, 2**31 + 3, 2**32, 2**32 + 3, 2**63 - 1, -(2**63)])  # for planes of 35


def unpool(input, indices, lists, size, layout):
    output = poisoned((*input.shape[:2], *size), input.dtype, layout)
    forward(input, arranged(indices, layout), *lists, size, output)
    return output


def unpool_backward(grad_output, indices, lists, layout):
    grad_input = poisoned(indices.shape, grad_output.dtype, layout)
    backward(grad_output, arranged(indices, layout), *lists, grad_input)
    return grad_input


def last_of(input, flat, size):
    """For every element the last input with its index; indices outside of the plane do not count."""
    plane = size[0] * size[1]
    inside = ((flat >= 0) & (flat < plane)).flatten(2)
    rank = torch.where(inside, torch.arange(1, inside.size(2) + 1), 0)  # of the input, from 1
    winner = torch.zeros(*flat.shape[:2], plane, dtype=torch.int64)
    winner.scatter_reduce_(2, torch.where(inside, flat.flatten(2), 0), rank, "amax")
    values = input.flatten(2).gather(2, (winner - 1).clamp(min=0))
    return torch.where(winner > 0, values, 0).unflatten(2, size)


def gradient_at(grad_output, flat):
    """The gradient at every index, zero for those outside the plane."""
    inside = (flat >= 0) & (flat < grad_output[0, 0].numel())
    picked = grad_output.flatten(2).gather(2, torch.where(inside, flat, 0).flatten(2)).view(flat.shape)
    return torch.where(inside, picked, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_last_input_at_an_index_counts(case, layout, dtype):
    geometry, size = case
    flat = window_indices((2, LAYOUTS[layout]), geometry, size)
    input = arranged(torch.randn(flat.shape).to(dtype), layout)
    expected = last_of(input, flat, size)
    for index_dtype in INDEX_DTYPES:
        indices = indices_of(flat, index_dtype, geometry, size[1])
        assert_same(unpool(input, indices, geometry.lists, size, layout), expected)
    assert_same(unpool(input, flat, UNKNOWN, size, layout), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_takes_the_gradient_at_every_index(case, layout, dtype):
    geometry, size = case
    flat = window_indices((2, LAYOUTS[layout]), geometry, size)
    grad_output = arranged(torch.randn(*flat.shape[:2], *size).to(dtype), layout)
    expected = gradient_at(grad_output, flat)
    for index_dtype in INDEX_DTYPES:
        indices = indices_of(flat, index_dtype, geometry, size[1])
        assert_same(unpool_backward(grad_output, indices, geometry.lists, layout), expected)
    assert_same(unpool_backward(grad_output, flat, UNKNOWN, layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (7, 8)])
def test_equals_torch(size, layout):
    flat = window_indices((2, LAYOUTS[layout]), TILED, size)
    input = arranged(torch.randn(flat.shape), layout).requires_grad_()
    expected = F.max_unpool2d(input, flat, 2, output_size=size)
    assert_same(unpool(input.detach(), flat, TILED.lists, size, layout), expected)
    grad_output = arranged(torch.randn(expected.shape), layout)
    expected.backward(grad_output)
    assert_same(unpool_backward(grad_output, flat, TILED.lists, layout), input.grad)


@pytest.mark.parametrize("output_size", [(5, 7), (5, 8), (6, 8), (7, 8), (7, 9), (10, 12), (4, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_larger_or_smaller_than_the_windows(output_size, layout):
    """Offsets that fall outside of the output do not count, elements that no window covers are cleared."""
    flat = window_indices((1, LAYOUTS[layout]), TILED, (6, 8))
    offsets = compact(flat, TILED, 8)
    row, column = flat // 8, flat % 8
    inside = (row < output_size[0]) & (column < output_size[1])
    flat = torch.where(inside, row * output_size[1] + column, -1)
    input = arranged(torch.randn(flat.shape), layout)
    grad_output = arranged(torch.randn(*flat.shape[:2], *output_size), layout)
    for indices in (offsets, flat):
        assert_same(unpool(input, indices, TILED.lists, output_size, layout), last_of(input, flat, output_size))
        gradient = unpool_backward(grad_output, indices, TILED.lists, layout)
        assert_same(gradient, gradient_at(grad_output, flat))


@pytest.mark.parametrize("lists", [UNKNOWN, TILED.lists, OVERLAPPING.lists, Geometry((3, 4), (3, 4)).lists], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_indices_from_anywhere(layout, dtype, lists):
    """Repeated and hostile indices, for any geometry; some more than a block takes in one round."""
    size, channels = (5, 7), LAYOUTS[layout]
    pooled = (3, 4) if lists is not UNKNOWN else (36, 31)
    flat = torch.randint(-3, 40, (2, channels, *pooled))
    flat[0, 0].view(-1)[:8] = HOSTILE
    input = arranged(torch.randn(flat.shape).to(dtype), layout)
    assert_same(unpool(input, flat, lists, size, layout), last_of(input, flat, size))
    grad_output = arranged(torch.randn(2, channels, *size).to(dtype), layout)
    assert_same(unpool_backward(grad_output, flat, lists, layout), gradient_at(grad_output, flat))


@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 2, 2, 3)])
@pytest.mark.parametrize("geometry", [TILED, OVERLAPPING], ids=["tiled", "overlapping"])
def test_a_single_index_outside_its_window(geometry, where):
    size = (6, 8)
    flat = window_indices((2, 3), geometry, size)
    for index in (0, 23, 47, 48, -1):
        indices = flat.clone()
        indices[where] = index
        input = torch.randn(flat.shape)
        assert_same(unpool(input, indices, geometry.lists, size, "contiguous"), last_of(input, indices, size))


@pytest.mark.parametrize("geometry", [TILED, OVERLAPPING], ids=["tiled", "overlapping"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_that_no_window_has_are_passed_over(geometry, layout):
    size = (6, 8)
    shape = window_indices((1, LAYOUTS[layout]), geometry, size).shape
    indices = torch.randint(9, 256, shape, dtype=torch.uint8)
    ones = arranged(torch.ones(shape), layout)
    assert not unpool(ones, indices, geometry.lists, size, layout).any()
    gradient = arranged(torch.ones(*shape[:2], *size), layout)
    assert not unpool_backward(gradient, indices, geometry.lists, layout).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_cells_than_threads(layout):
    """The grid is sized by the device, here two multiprocessors: threads loop several times."""
    size = (134, 131)
    for geometry in (TILED, OVERLAPPING):
        flat = window_indices((3, 4), geometry, size)
        input = arranged(numbers(flat.shape), layout)
        grad_output = arranged(numbers((3, 4, *size)), layout)
        for indices in (flat, compact(flat, geometry, size[1])):
            assert_same(unpool(input, indices, geometry.lists, size, layout), last_of(input, flat, size))
            gradient = unpool_backward(grad_output, indices, geometry.lists, layout)
            assert_same(gradient, gradient_at(grad_output, flat))


def test_more_planes_than_blocks():
    """Arbitrary indices: a block takes a plane at a time, and there are 4 blocks for each of 2 multiprocessors."""
    flat = torch.randint(0, 4, (3, 7, 1, 2))
    input = torch.randn(flat.shape)
    assert_same(unpool(input, flat, UNKNOWN, (2, 2), "contiguous"), last_of(input, flat, (2, 2)))


def test_empty_batch():
    input, indices = torch.empty(0, 3, 2, 2), torch.empty(0, 3, 2, 2, dtype=torch.int64)
    for index in (indices, indices.to(torch.uint8)):
        assert unpool(input, index, TILED.lists, (4, 4), "contiguous").numel() == 0
        assert unpool_backward(torch.empty(0, 3, 4, 4), index, TILED.lists, "contiguous").numel() == 0


def test_arguments_are_checked():
    input, output = torch.rand(1, 8, 2, 2), torch.empty(1, 8, 4, 4)
    offsets = torch.zeros(1, 8, 2, 2, dtype=torch.uint8)
    last = output.contiguous(memory_format=torch.channels_last)
    for arguments, message in [
        ((input, offsets, *UNKNOWN, output), "must be pairs"),
        ((input, offsets, *Geometry((16, 16)).lists, output), "windows of 256 elements; allowed: 255"),
        ((input, offsets.int(), *TILED.lists, output), "indices must be int64 or uint8"),
        ((input.half(), offsets, *TILED.lists, output), "differ in dtype"),
        ((input.int(), offsets, *TILED.lists, output.int()), "dtype must be float32"),
        ((input, offsets[..., :1].contiguous(), *TILED.lists, output), "indices has size 1 in dimension 3"),
        ((input, offsets, *TILED.lists, last), "all contiguous or all channels_last"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments[:-1], arguments[-1].shape[2:], arguments[-1])
