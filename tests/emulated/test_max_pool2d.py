"""The CUDA kernels of max_pool2d, run on the CPU."""

import pytest
import torch

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
    special_numbers,
    stock_pool,
    window_indices,
)

forward = torch.ops.fastseg_emulator._max_pool2d
backward = torch.ops.fastseg_emulator._max_pool2d_backward
UNKNOWN = ([], [], [], [])  # the geometry of flat indices that come from no known pooling


def pool(input, geometry, index_dtype, layout, pooled_shape):
    output = poisoned(pooled_shape, input.dtype, layout)
    indices = poisoned(pooled_shape, index_dtype, layout)
    forward(input, *geometry.lists, geometry.ceil_mode, True, index_dtype == torch.uint8, output, indices)
    return output, indices


def pool_backward(grad_output, indices, lists, shape, layout):
    grad_input = poisoned(shape, grad_output.dtype, layout)
    backward(grad_output, indices, *lists, shape[2:], grad_input)
    return grad_input


def sums(grad_output, flat, size):
    """Every gradient added at its index, in fp64; indices outside of the plane do not count."""
    plane = size[0] * size[1]
    inside = (flat >= 0) & (flat < plane)
    values = torch.where(inside, grad_output.double(), 0.0).flatten(2)
    total = torch.zeros(*flat.shape[:2], plane, dtype=torch.float64)
    return total.scatter_add(2, torch.where(inside, flat, 0).flatten(2), values).unflatten(2, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_equals_torch(case, layout, dtype):
    geometry, size = case
    input = arranged(special_numbers((2, LAYOUTS[layout], *size), dtype), layout)
    expected, flat = stock_pool(input, geometry)
    for index_dtype in INDEX_DTYPES:
        output, indices = pool(input, geometry, index_dtype, layout, expected.shape)
        assert_same(output, expected)
        assert_same(indices, indices_of(flat, index_dtype, geometry, size[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_adds_every_gradient_at_its_index(case, layout, dtype):
    geometry, size = case
    channels = LAYOUTS[layout]
    flat = arranged(window_indices((2, channels), geometry, size), layout)
    grad_output = arranged(numbers(flat.shape, dtype), layout)
    expected = sums(grad_output, flat, size)
    for index_dtype in INDEX_DTYPES:
        indices = arranged(indices_of(flat, index_dtype, geometry, size[1]), layout)
        assert_same(pool_backward(grad_output, indices, geometry.lists, expected.shape, layout), expected)
    assert_same(pool_backward(grad_output, flat, UNKNOWN, expected.shape, layout), expected)


@pytest.mark.parametrize(
    "window, expected",
    [("nan 0 0 1", 0), ("nan 0 0 nan", 3), ("0 2 2 1", 1), ("-inf -inf -inf -inf", 0), ("1 inf inf nan", 3)],
)
def test_ties(window, expected):
    """The first maximum counts, but the last NaN."""
    input = torch.tensor([float(value) for value in window.split()]).view(1, 1, 2, 2)
    for index_dtype in INDEX_DTYPES:
        _, indices = pool(input, TILED, index_dtype, "contiguous", (1, 1, 1, 1))
        assert indices.item() == expected


def test_windows_without_an_element():
    """All taps of a dilated window may miss a small plane: torch gives -inf and an index past it."""
    geometry = Geometry((2, 2), (1, 1), (1, 1), (4, 4))
    input = torch.ones(1, 1, 3, 3)
    expected, flat = stock_pool(input, geometry)
    assert expected.isinf().any()
    output, indices = pool(input, geometry, torch.int64, "contiguous", expected.shape)
    assert_same(output, expected)
    assert_same(indices, flat)
    _, offsets = pool(input, geometry, torch.uint8, "contiguous", expected.shape)
    assert offsets.tolist() == [[[[3]]]]  # the first tap after the padding
    for index in (indices, offsets):
        grad_input = pool_backward(torch.ones_like(output), index, geometry.lists, input.shape, "contiguous")
        assert_same(grad_input, sums(torch.ones_like(output), flat, (3, 3)))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_gradients_of_half_precision_are_added_in_fp32(index_dtype):
    """256 + 1 is 256 in bfloat16, 256 + 8 * 1 is not."""
    geometry = Geometry((3, 3), (1, 1), (1, 1))
    input = torch.zeros(1, 1, 5, 5)
    input[0, 0, 2, 2] = 1
    _, flat = stock_pool(input, geometry)
    grad_output = torch.ones(1, 1, 5, 5, dtype=torch.bfloat16)
    grad_output[0, 0, 1, 1] = 256
    indices = indices_of(flat, index_dtype, geometry, 5)
    grad_input = pool_backward(grad_output, indices, geometry.lists, (1, 1, 5, 5), "contiguous")
    assert grad_input[0, 0, 2, 2] == 264


@pytest.mark.parametrize("geometry", [TILED, OVERLAPPING])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_offsets_that_no_window_has_are_passed_over(geometry, layout):
    shape = (1, LAYOUTS[layout], 6, 8)
    _, flat = stock_pool(torch.rand(shape), geometry)
    indices = torch.randint(9, 256, flat.shape, dtype=torch.uint8)
    grad_output = arranged(torch.ones(flat.shape), layout)
    assert not pool_backward(grad_output, arranged(indices, layout), geometry.lists, shape, layout).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_indices_of_unknown_windows(layout, dtype):
    """Repeated and hostile indices, more than a block takes in one round; sums small enough for bfloat16."""
    size, channels = (5, 7), LAYOUTS[layout]
    flat = torch.randint(-3, 40, (2, channels, 17, 31))
    flat[0, 0, 3, :8] = torch.tensor([-1, 35, 2**31, 2**31 + 3, 2**32, 2**32 + 3, 2**63 - 1, -(2**63)])
    grad_output = arranged(numbers(flat.shape, dtype), layout)
    grad_input = pool_backward(grad_output, arranged(flat, layout), UNKNOWN, (2, channels, *size), layout)
    assert_same(grad_input, sums(grad_output, flat, size))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_cells_than_threads(layout):
    """The grid is sized by the device, here two multiprocessors: threads loop several times."""
    shape = (3, 4, 134, 131)
    for geometry in (TILED, OVERLAPPING):
        input = arranged(numbers(shape), layout)
        expected, flat = stock_pool(input, geometry)
        output, indices = pool(input, geometry, torch.uint8, layout, expected.shape)
        assert_same(output, expected)
        assert_same(indices, compact(flat, geometry, 131))
        grad_output = arranged(numbers(expected.shape), layout)
        grad_input = pool_backward(grad_output, indices, geometry.lists, shape, layout)
        assert_same(grad_input, sums(grad_output, flat, shape[2:]))


def test_empty_batch():
    output, indices = pool(torch.empty(0, 3, 4, 4), TILED, torch.uint8, "contiguous", (0, 3, 2, 2))
    assert output.shape == indices.shape == (0, 3, 2, 2)
    assert pool_backward(output, indices, TILED.lists, (0, 3, 4, 4), "contiguous").numel() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": (16, 16)}, "windows of 256 elements; allowed: 255"),
        ({"stride": (0, 2)}, "must be pairs"),
        ({"kernel": (2, 2**31)}, "must be pairs"),
        ({"padding": (-1, 0)}, "must be pairs"),
    ],
)
def test_geometry_is_checked(change, message):
    pooled = torch.empty(1, 1, 2, 2)
    with pytest.raises(RuntimeError, match=message):
        forward(torch.rand(1, 1, 4, 4), *Geometry(**change).lists, False, True, True, pooled, pooled.to(torch.uint8))


def test_tensors_are_checked():
    input, output = torch.rand(1, 8, 4, 4), torch.empty(1, 8, 2, 2)
    indices = torch.empty(1, 8, 2, 2, dtype=torch.int64)
    last = output.contiguous(memory_format=torch.channels_last)
    for arguments, message in [
        ((input, output, indices.int()), "indices must be int64 or uint8"),
        ((input, output.double(), indices), "differ in dtype"),
        ((input, last, indices), "all contiguous or all channels_last"),
        ((input, output[:, :7].contiguous(), indices), "output has size 7 in dimension 1; allowed: 8"),
        ((input[0], output, indices), "input must have 4 dimensions"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            forward(arguments[0], *TILED.lists, False, True, False, *arguments[1:])
