"""roi_align and multiscale_roi_align: golden tables, a plain formulation in every form of arguments, hostile boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg import ops
from fastseg._layout import image_format
from fastseg.kernels.roi_align import reference
from fastseg.ops import multiscale_roi_align, roi_align
from fastseg.ops.roi_align import level_areas
from fastseg.testing import assert_within_policy
from tests.contract import Case, Contract
from tests.ops.plain_roi_align import plain_multiscale_roi_align, plain_roi_align

BACKENDS = ("cpu", "reference")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INSIDE = [[0, 1, 1, 8, 7], [1, 0.3, 2.2, 5.7, 6.1], [0, 4, 3, 4.5, 3.2], [1, 2, 0, 9, 8.4], [0, 0, 0, 11, 9]]
OUTSIDE = [[0, -7, -3, 4, 5], [1, 6, 5, 40, 30], [1, -90, -90, -50, -50], [0, 8, 8, 3, 2], [1, 3, 3, 3, 3]]


def case(name, shape, boxes, small=True, **options):
    def arguments(make):
        rows = torch.tensor(boxes, dtype=torch.float32, device=make.device).view(-1, 5)
        return dict(input=make.floating(*shape), boxes=rows, **{"output_size": (2, 3), "sampling_ratio": 2, **options})

    return Case(name, arguments, small)


CASES = [
    case("two samples", (2, 3, 9, 11), INSIDE),
    case("aligned", (2, 3, 9, 11), INSIDE, aligned=True, sampling_ratio=1),
    case("adaptive", (2, 2, 9, 11), INSIDE, sampling_ratio=-1),
    case("adaptive, aligned, scaled", (2, 2, 9, 11), INSIDE, sampling_ratio=0, aligned=True, spatial_scale=0.8),
    case("outside", (2, 3, 9, 11), OUTSIDE),
    case("outside, aligned", (2, 3, 9, 11), OUTSIDE, aligned=True),
    case("outside, adaptive", (2, 3, 9, 11), OUTSIDE, aligned=True, sampling_ratio=-1),
    case("one cell", (2, 9, 1, 1), INSIDE, output_size=1),
    case("no box", (2, 3, 9, 11), []),
    case("empty batch", (0, 3, 9, 11), []),
    case("many channels", (2, 83, 9, 11), INSIDE + OUTSIDE, small=False, output_size=(5, 4)),
    case("a mask", (2, 1, 40, 56), [[0, 3, 5, 50, 31], [1, 10, 2, 30, 39]], small=False, output_size=14,
         sampling_ratio=-1),
    case("more bins than cells", (2, 16, 9, 11), INSIDE, small=False, output_size=(20, 37), sampling_ratio=3),
]  # fmt: skip


def two_levels(input, other, boxes, output_size=2, **options):
    return multiscale_roi_align(
        [input, other], boxes, output_size, [0.25, 0.125], canonical_scale=16, canonical_level=3, **options
    )


def plain_two_levels(input, other, boxes, output_size=2, **options):
    return plain_multiscale_roi_align(
        [input, other], boxes, output_size, [0.25, 0.125], canonical_scale=16, canonical_level=3, **options
    )


def pyramid_case(name, channels, **options):
    boxes = [[0, 2, 3, 30, 20], [1, 5, 5, 12, 13], [1, 0, 0, 39, 31], [0, 20, 20, 26, 24], [0, -9, 3, 70, 60]]

    def arguments(make):
        rows = torch.tensor(boxes, dtype=torch.float32, device=make.device)
        maps = dict(input=make.floating(2, channels, 8, 10), other=make.floating(2, channels, 4, 5))
        return dict(**maps, boxes=rows, **options)

    return Case(name, arguments, small=channels < 4)


CONTRACTS = [
    # Without fp64: there stock is the fp64 reference itself. gradcheck and the tests below use fp64.
    Contract(function=roi_align, stock=plain_roi_align, cases=CASES, dtypes=FLOATS[:3]),
    Contract(
        function=two_levels,
        stock=plain_two_levels,
        cases=[
            pyramid_case("two samples", 2),
            pyramid_case("many channels", 21),
            pyramid_case("adaptive", 2, sampling_ratio=-1, aligned=True),
        ],
        dtypes=FLOATS[:3],
        name="multiscale_roi_align",
    ),
]

RAMP = (6 * torch.arange(6.0)[:, None] + torch.arange(6.0)).view(1, 1, 6, 6)
GOLDEN = [  # box, sampling_ratio, not aligned, aligned
    ((1, 1, 4, 3.5), 2, [[11.5, 13.0], [19.0, 20.5]], [[8.0, 9.5], [15.5, 17.0]]),
    ((-2, -2, 2, 2), 2, [[0, 0.5], [3, 7]], [[0, 0.25], [1.5, 3.5]]),
    ((0.2, 0.2, 0.6, 0.6), 2, [[3.15, 3.65], [6.15, 6.65]], [[0, 0.025], [0.15, 0.175]]),
    ((1, 0, 6, 6), -1, [[11.25, 13.555556], [28.25, 30.555556]], [[7.75, 10.222222], [25.75, 28.222222]]),
    ((0, 0, 6, 6), 0, [[10.5, 13.333333], [27.5, 30.333333]], [[7, 10], [25, 28]]),
]
GOLDEN_GRADIENTS = {  # of the first box, of ones: rows and columns that are not 0
    False: (slice(1, 5), slice(1, 5), [[0.117188, 0.257812, 0.257812, 0.117188],
            [0.263672, 0.580078, 0.580078, 0.263672], [0.214844, 0.472656, 0.472656, 0.214844],
                [0.029297, 0.064453, 0.064453, 0.029297]]),
    True: (slice(0, 4), slice(0, 5), [[0.005859, 0.058594, 0.058594, 0.058594, 0.005859],
           [0.042969, 0.429688, 0.429688, 0.429688, 0.042969], [0.052734, 0.527344, 0.527344, 0.527344, 0.052734],
           [0.023438, 0.234375, 0.234375, 0.234375, 0.023438]]),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("box, sampling_ratio, legacy, aligned", GOLDEN)
def test_golden_values(box, sampling_ratio, legacy, aligned, layout, backend):
    """A map of one channel, and of several, each twice the one before."""
    boxes = torch.tensor([[0.0, *box]])
    for channels in (1, 20):
        factors = 2.0 ** torch.arange(channels).view(1, -1, 1, 1)
        input = (RAMP * factors).contiguous(memory_format=layout)
        for is_aligned, expected in ((False, legacy), (True, aligned)):
            output = roi_align(input, boxes, 2, 1.0, sampling_ratio, is_aligned, backend=backend)
            expected = torch.tensor([[expected]], dtype=torch.float32).expand_as(output)
            torch.testing.assert_close(output / factors, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aligned", GOLDEN_GRADIENTS)
def test_golden_gradients(aligned, backend):
    rows, columns, values = GOLDEN_GRADIENTS[aligned]
    input = RAMP.expand(1, 17, 6, 6).clone().requires_grad_()
    roi_align(input, torch.tensor([[0, 1, 1, 4, 3.5]]), 2, 1.0, 2, aligned, backend=backend).sum().backward()
    expected = torch.zeros(6, 6)
    expected[rows, columns] = torch.tensor(values)
    torch.testing.assert_close(input.grad, expected.expand_as(input), rtol=0, atol=1e-6)


def test_golden_levels():
    """The side of a square and the level of its box."""
    sides = torch.tensor([32.0, 111, 112, 223, 224, 447, 448, 896])
    areas = level_areas(4, 224, 4, 2)
    assert [2 + sum(side * side >= area for area in areas) for side in sides.tolist()] == [2, 2, 3, 3, 4, 4, 5, 5]
    inputs = [torch.full((1, 9, 300 >> level, 300 >> level), 2.0 + level) for level in range(4)]
    boxes = torch.cat([torch.zeros(8, 3), sides[:, None], sides[:, None]], 1)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for backend in BACKENDS:
        pooled = multiscale_roi_align(inputs, boxes, 2, scales, backend=backend)
        assert pooled[:, 0, 0, 0].tolist() == [2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.sanitized
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_boxes_equal_the_plain_formulation(data):
    """Values and gradients of boxes in and around the map, for any sizes, layouts and dtypes."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    shape = draw(1, 2, 3), draw(1, 3, 8, 17, 33, 70), data.draw(st.integers(1, 23)), data.draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    dtype, count = draw(*FLOATS[:3]), data.draw(st.integers(0, 9))
    layout = draw(torch.contiguous_format, torch.channels_last)
    input = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)
    boxes = torch.rand(count, 5, generator=generator) * 60 - 15
    boxes[:, 3:] += draw(0, 30) + boxes[:, 1:3].clamp(min=0)
    boxes[:, 0] = torch.randint(shape[0], (count,), generator=generator)
    size = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    options = dict(output_size=size, spatial_scale=draw(1, 0.25),
                   sampling_ratio=draw(-1, 0, 1, 2, 5, 11), aligned=draw(True, False))  # fmt: skip

    def run(function, values, **more):
        values = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = function(values, boxes, **options, **more)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        gradient = gradient.to(values.dtype).contiguous(memory_format=gradient_layout)
        return output.detach(), torch.autograd.grad(output, values, gradient)[0]

    gradient_layout = draw(torch.contiguous_format, torch.channels_last)
    plain, exact = run(plain_roi_align, input), run(plain_roi_align, input.double())
    for backend in BACKENDS:
        ours = run(roi_align, input, backend=backend)
        for what, mine, theirs, true in zip(("output", "gradient"), ours, plain, exact):
            assert mine.is_contiguous(memory_format=image_format(input))
            assert_within_policy(mine, theirs, true, what)


NAN, INF = float("nan"), float("inf")
HOSTILE = [
    [0, NAN, 1, 4, 4], [0, 1, 1, NAN, 4], [0, 1, 1, 4, INF], [0, -INF, -INF, INF, INF], [0, INF, INF, INF, INF],
    [0, NAN, NAN, NAN, NAN], [0, 3e38, 3e38, -3e38, -3e38], [0, -3e38, 0, 3e38, 5],
]  # fmt: skip
HUGE = [
    [0, -1e9, -1e9, 1e9, 1e9], [0, 1e9, 1e9, 2e9, 2e9], [0, -1e6, 2, 1e6, 5], [0, 0, 0, 1e5, 1e5],
    [0, 1e20, 1, 1e20, 4], [0, -1e12, -1e12, 3, 4], [0, -3e4, 1, 2e4, 7], [0, 1e30, 1e30, -1e30, -1e30],
    [0, 5, 5, 5 + 1e7, 6],
]  # fmt: skip


@pytest.mark.sanitized
@pytest.mark.parametrize("sampling_ratio", [-1, 2, 1000])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 20])
def test_boxes_that_are_not_finite_give_zeros(channels, layout, aligned, sampling_ratio):
    input = torch.randn(1, channels, 7, 9).contiguous(memory_format=layout).requires_grad_()
    for backend in BACKENDS:
        output = roi_align(input, torch.tensor(HOSTILE), 3, 1.0, sampling_ratio, aligned, backend=backend)
        assert not output[:6].any() and output.isfinite().all()
        assert not torch.autograd.grad(output[:6].sum(), input)[0].any()


@pytest.mark.sanitized
@pytest.mark.parametrize("sampling_ratio", [-1, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_huge_boxes(aligned, sampling_ratio):
    """Fast, and with the values that the samples in the map give."""
    input = torch.randn(1, 20, 7, 9, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(HUGE, dtype=torch.float64)
    outputs = [roi_align(input, boxes, 3, 1.0, sampling_ratio, aligned, backend=backend) for backend in BACKENDS]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), input)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    options = 3, 1.0, sampling_ratio, aligned
    single = [roi_align(input.float(), boxes.float(), *options, backend=backend) for backend in BACKENDS]
    torch.testing.assert_close(*single, rtol=1e-4, atol=1e-5)
    if sampling_ratio < 0:  # some thousand samples, few enough for the plain formulation
        plain = plain_roi_align(input, boxes[[6]], 3, 1.0, -1, aligned)
        torch.testing.assert_close(outputs[0][[6]], plain, rtol=1e-9, atol=1e-12)


@pytest.mark.sanitized
@pytest.mark.parametrize("index", [-1, -2, 2, 1e9, -1e30, NAN, INF])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_index_outside_the_batch(index, backend):
    input = torch.randn(2, 9, 7, 9, requires_grad=True)
    boxes = torch.tensor([[0, 1, 1, 4, 4], [float(index), 1, 1, 4, 4]])
    with pytest.raises(IndexError, match=r"fastseg.ops.roi_align: boxes\[1\] has batch index .*; allowed: 0 to 1"):
        roi_align(input, boxes, 2, backend=backend)
    with pytest.raises(IndexError, match="allowed: no box, input is an empty batch"):
        roi_align(input[:0], boxes, 2, backend=backend)


@pytest.mark.sanitized
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_that_weigh_nothing_do_not_count(backend, layout):
    """NaN and infinities around the box, and gradients of other boxes."""
    input = torch.full((1, 18, 9, 9), NAN).contiguous(memory_format=layout)
    input[..., 2:7, 2:7] = 1.0
    input[..., 0, 0] = INF
    input.requires_grad_()
    boxes = torch.tensor([[0, 2.5, 2.5, 5.5, 5.5], [0, 0, 0, 1, 1.0]])
    output = roi_align(input, boxes, 3, 1.0, 2, backend=backend)
    assert (output[0] == 1).all()
    gradient = torch.full_like(output, NAN)
    gradient[0] = 1
    found = torch.autograd.grad(output, input, gradient)[0]
    assert found[..., 3:7, 3:7].isfinite().all() and found[..., :2, :2].isnan().all()


def test_a_list_of_boxes():
    input, rows = torch.randn(2, 9, 9, 11), torch.tensor(sorted(INSIDE))
    boxes = [rows[rows[:, 0] == image, 1:] for image in range(2)]
    assert torch.equal(roi_align(input, boxes, 2), roi_align(input, rows, 2))
    assert roi_align(input[:0], [], 2).shape == (0, 9, 2, 2)


def test_half_boxes_and_a_large_batch():
    """Rows of half types cannot hold an index above 256 or 2048; lists can."""
    input = torch.arange(300.0).view(300, 1, 1, 1).expand(300, 8, 5, 5)
    boxes = [torch.tensor([[0, 0, 3.5, 3.5]], dtype=torch.bfloat16)] * 300
    assert torch.equal(roi_align(input, boxes, 1, 1.0, 2)[:, 0, 0, 0], torch.arange(300.0))


def test_deterministic_whatever_the_threads():
    input = torch.randn(2, 40, 60, 70).contiguous(memory_format=torch.channels_last).requires_grad_()
    boxes = torch.rand(300, 5) * 30
    boxes[:, 3:] += 30
    boxes[:, 0] = torch.randint(2, (300,))
    gradients, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for values in (input, input.detach().contiguous().requires_grad_()):
                output = roi_align(values, boxes, 7, 1.0, 2)
                gradients.append(torch.autograd.grad(output.square().sum(), values)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_boxes_get_no_gradient():
    input, boxes = torch.randn(1, 2, 5, 5, requires_grad=True), torch.tensor([[0, 1, 1, 4, 4.0]], requires_grad=True)
    roi_align(input, boxes, 2).sum().backward()
    assert boxes.grad is None and input.grad is not None


IMAGE, BOX = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1, 1, 4, 4.0]])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((IMAGE.numpy(), BOX, 2), TypeError, "input is ndarray; allowed: torch.Tensor"),
        ((IMAGE[0], BOX, 2), RuntimeError, r"input has shape \(3, 8, 8\); allowed: \(N, C, H, W\), empty in N only"),
        ((IMAGE[..., :0], BOX, 2), RuntimeError, r"input has shape \(2, 3, 8, 0\); allowed: .*, empty in N only"),
        ((IMAGE, BOX[:, 1:], 2), RuntimeError, r"boxes has shape \(1, 4\); allowed: \(K, 5\) \(batch index, x1,"),
        ((IMAGE, BOX.int(), 2), RuntimeError, "boxes has dtype int32; allowed: float32, "),
        ((IMAGE, None, 2), TypeError, "boxes is NoneType; allowed: torch.Tensor, or a list of them"),
        ((IMAGE, [BOX[:, 1:]], 2), RuntimeError, "boxes is a list of 1; allowed: one tensor for each of the 2 images"),
        ((IMAGE, [BOX, BOX], 2), RuntimeError, r"boxes\[0\] has shape \(1, 5\); allowed: \(L, 4\)"),
        ((IMAGE, BOX, 0), RuntimeError, r"output_size=\(0, 0\); allowed: 1 or more"),
        ((IMAGE, BOX, 2.0), TypeError, "output_size=2.0, float; allowed: int, or two of them"),
        ((IMAGE, BOX, (1, 2, 3)), RuntimeError, r"output_size=\(1, 2, 3\); allowed: one int, or one each for height"),
        ((IMAGE, BOX, 2, 0.0), ValueError, "spatial_scale=0.0; allowed: a positive number"),
        ((IMAGE, BOX, 2, NAN), ValueError, "spatial_scale=nan; allowed: a positive number"),
        ((IMAGE, BOX, 2, "1"), TypeError, "spatial_scale='1'; allowed: a number"),
        ((IMAGE, BOX, 2, 1.0, 1.5), TypeError, "sampling_ratio=1.5, float; allowed: int"),
        ((IMAGE, BOX, 2, 1.0, 10**9), ValueError, "sampling_ratio=1000000000; allowed: 1 to 1024, or 0 and less"),
        ((IMAGE, BOX, 2, 1.0, 2, 1), TypeError, "aligned=1; allowed: True or False"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"fastseg.ops.roi_align: {message}"):
        roi_align(*arguments)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((IMAGE, BOX, 2, [1.0]), {}, TypeError, "inputs is Tensor; allowed: a list of torch.Tensor"),
        (([], BOX, 2, []), {}, ValueError, "0 inputs; allowed: 1 to 5"),
        (([IMAGE, None], BOX, 2, [1, 0.5]), {}, TypeError, r"inputs\[1\] is NoneType; allowed: torch.Tensor"),
        (([IMAGE], BOX, 2, [1.0, 0.5]), {}, ValueError, r"spatial_scales=\[1.0, 0.5\]; allowed: a list of 1"),
        (([IMAGE], BOX, 2, [-1.0]), {}, ValueError, r"spatial_scales\[0\]=-1.0; allowed: a positive number"),
        (([IMAGE], BOX, 2, [1.0]), dict(canonical_scale=0), ValueError, "canonical_scale=0; allowed: a positive"),
        (([IMAGE], BOX, 2, [1.0]), dict(min_level=0.5), TypeError, "min_level=0.5, float; allowed: int, or None"),
    ],
)
def test_errors_of_pyramids(arguments, options, error, message):
    with pytest.raises(error, match=f"fastseg.ops.multiscale_roi_align: {message}"):
        multiscale_roi_align(*arguments, **options)


@pytest.mark.parametrize("other", [IMAGE[:1], IMAGE[:, :2], IMAGE.double()])
def test_levels_must_fit(other):
    with pytest.raises(RuntimeError, match=r"roi_align: inputs\[1\] has "):
        multiscale_roi_align([IMAGE, other], BOX, 2, [1.0, 0.5])


@pytest.mark.sanitized
def test_five_levels_and_one():
    inputs = [torch.randn(2, 9, 64 >> level, 96 >> level).requires_grad_() for level in range(5)]
    boxes = torch.rand(60, 5) * 60
    boxes[:, 3:] = boxes[:, 1:3] + torch.rand(60, 2) ** 3 * 300
    boxes[:, 0] = torch.randint(2, (60,))
    scales = [2.0**-level for level in range(5)]
    options = dict(canonical_scale=16, canonical_level=2, min_level=0)
    for count in (5, 1):
        expected = plain_multiscale_roi_align(inputs[:count], boxes, 3, scales[:count], 2, False, 16, 2)
        gradients = torch.autograd.grad(expected.square().sum(), inputs[:count])
        for backend in BACKENDS:
            output = multiscale_roi_align(inputs[:count], boxes, 3, scales[:count], **options, backend=backend)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
            for ours, theirs in zip(torch.autograd.grad(output.square().sum(), inputs[:count]), gradients):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_reference_needs_no_kernel():
    """Called directly, also on meta tensors."""
    output = reference.roi_align(IMAGE, None, None, None, None, BOX, (2, 2), [1.0], [], 2, False, False)
    assert output.shape == (1, 3, 2, 2)
    assert ops.roi_align(IMAGE.to("meta"), BOX.to("meta"), 2).shape == (1, 3, 2, 2)
