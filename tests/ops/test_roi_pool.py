"""roi_pool: golden table, a plain formulation in every form of the arguments, hostile boxes, NaN."""

import pytest
import torch

from fastseg.ops import roi_pool
from tests.contract import Case, Contract

BACKENDS = ("cpu", "reference")
BOXES = [[0, 1, 1, 8, 7], [1, 0.3, 2.2, 5.7, 6.1], [0, 4, 3, 4.5, 3.2], [1, -7, -3, 4, 5], [0, 6, 5, 40, 30],
         [1, 8, 8, 3, 2], [0, -90, -90, -50, -50]]  # fmt: skip


def _half_away(value):
    return int(torch.floor(value.abs() + 0.5) * value.sign())


def plain_roi_pool(input, boxes, output_size, spatial_scale=1.0):
    """Bin by bin, like Caffe's layer."""
    bin_rows, bin_columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    if not isinstance(boxes, torch.Tensor):
        boxes = torch.cat([torch.cat([torch.full_like(own[:, :1], i), own], 1) for i, own in enumerate(boxes)])
    _, channels, height, width = input.shape
    found = []
    for box in boxes.float().cpu():
        left, top, right, bottom = (_half_away(edge * spatial_scale) for edge in box[1:])
        down = torch.tensor(float(max(bottom - top + 1, 1))) / bin_rows
        across = torch.tensor(float(max(right - left + 1, 1))) / bin_columns
        bins = []
        for i in range(bin_rows):
            first_row = min(max(int((i * down).floor()) + top, 0), height)
            end_row = min(max(int(((i + 1) * down).ceil()) + top, 0), height)
            for j in range(bin_columns):
                first = min(max(int((j * across).floor()) + left, 0), width)
                end = min(max(int(((j + 1) * across).ceil()) + left, 0), width)
                cells = input[int(box[0]), :, first_row:end_row, first:end].flatten(1)
                if cells.numel():
                    bins.append(cells.gather(1, cells.argmax(1, keepdim=True))[:, 0])
                else:
                    bins.append(input.new_zeros(channels))
        found.append(torch.stack(bins, 1).view(channels, bin_rows, bin_columns))
    if not found:
        return input.sum() * 0 + input.new_zeros(0, channels, bin_rows, bin_columns)
    return torch.stack(found)


def case(name, shape, boxes, small=True, **options):
    def arguments(make):
        rows = torch.tensor(boxes, dtype=torch.float32, device=make.device).view(-1, 5)
        return dict(input=make.floating(*shape), boxes=rows, **{"output_size": (2, 3), **options})

    return Case(name, arguments, small)


CONTRACTS = [
    Contract(
        function=roi_pool,
        stock=plain_roi_pool,
        cases=[
            case("rectangles", (2, 3, 9, 11), BOXES),
            case("scaled", (2, 2, 5, 6), BOXES, spatial_scale=0.5),
            case("no box", (2, 3, 9, 11), []),
            case("empty batch", (0, 3, 9, 11), []),
            case("many channels", (2, 37, 9, 11), BOXES, small=False),
            case("more bins than cells", (2, 16, 5, 4), BOXES, small=False, output_size=(13, 9)),
        ],
    )
]

RAMP = (6 * torch.arange(6.0)[:, None] + torch.arange(6.0)).view(1, 1, 6, 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "box, scale, size, expected",
    [
        ((1.0, 1.0, 4.4, 3.6), 1, 2, [[14, 16], [26, 28]]),
        ((0.5, 0.5, 2.5, 2.5), 1, 2, [[14, 15], [20, 21]]),
        ((4.0, 4, 9, 9), 1, 3, [[35, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ((16.0, 8, 71, 40), 1 / 16, 2, [[14, 16], [20, 22]]),
    ],
)
def test_golden_values(box, scale, size, expected, layout, backend):
    """Values of the golden table; the gradient of a ramp's maximum goes to its place."""
    for channels in (1, 20):
        input = RAMP.expand(1, channels, 6, 6).contiguous(memory_format=layout).requires_grad_()
        output = roi_pool(input, torch.tensor([[0.0, *box]]), size, scale, backend=backend)
        expected_bins = torch.tensor(expected, dtype=torch.float32)
        assert torch.equal(output, expected_bins.expand_as(output))
        output.sum().backward()
        places = torch.zeros(36)
        places[expected_bins[expected_bins > 0].long()] = 1
        assert torch.equal(input.grad, places.view(6, 6).expand_as(input))


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_of_maxima(backend):
    """The first of equal maxima, the last NaN, -1 without a cell."""
    input = torch.zeros(1, 9, 4, 4)
    input[0, 0, 1, 2] = input[0, 0, 2, 1] = float("nan")
    input[0, 1] = -float("inf")
    boxes = torch.tensor([[0, 0.0, 0, 3, 3], [0, 9, 9, 12, 12]])
    output, argmax = torch.ops.fastseg.roi_pool(input, boxes, [1, 1], 1.0, False, backend)
    assert argmax.flatten(1)[:, :3].tolist() == [[9, 0, 0], [-1, -1, -1]]
    assert output[0, 0].isnan() and output[0, 1] == -float("inf") and not output[1].any()


def test_a_list_of_boxes():
    input, rows = torch.randn(2, 9, 9, 11), torch.tensor(sorted(BOXES))
    boxes = [rows[rows[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(roi_pool(input, boxes, 2), roi_pool(input, rows, 2))


NAN, INF = float("nan"), float("inf")


@pytest.mark.sanitized
@pytest.mark.parametrize("channels", [2, 20])
def test_boxes_that_are_not_finite_or_huge(channels):
    boxes = torch.tensor([[0, NAN, 1, 4, 4], [0, 1, 1, 4, INF], [0, -INF, -INF, INF, INF],
                          [0, -3e38, -3e38, 3e38, 3e38], [0, 3e38, 1, 3e38, 4], [0, -2e9, 1, 2e9, 3]])  # fmt: skip
    input = torch.randn(1, channels, 7, 9, requires_grad=True)
    outputs = [roi_pool(input, boxes, 2, backend=backend) for backend in BACKENDS]
    assert torch.equal(*outputs) and not outputs[0][:3].any()
    gradients = [torch.autograd.grad(output.sum(), input)[0] for output in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.sanitized
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [-1.0, 2.0, NAN, 1e30])
def test_a_batch_index_outside_the_batch(index, backend):
    boxes = torch.tensor([[index, 1, 1, 4, 4]])
    with pytest.raises(IndexError, match=r"fastseg.ops.roi_pool: boxes\[0\] has batch index .*; allowed: 0 to 1"):
        roi_pool(torch.zeros(2, 3, 8, 8), boxes, 2, backend=backend)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, None, 2), TypeError, "input is NoneType; allowed: torch.Tensor"),
        ((torch.zeros(3, 8, 8), torch.zeros(1, 5), 2), RuntimeError, r"input has shape \(3, 8, 8\); allowed: \(N, C,"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 4), 2), RuntimeError, r"boxes has shape \(1, 4\); allowed: \(K, 5\)"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 5), -1), RuntimeError, r"output_size=\(-1, -1\); allowed: 1 or more"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 5), 2, 0), ValueError, "spatial_scale=0; allowed: a positive number"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"fastseg.ops.roi_pool: {message}"):
        roi_pool(*arguments)
