"""FCN on VGG16 against a plain torch.nn build that shares no code with it, and the facts of its release."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from fastseg.models.vgg import VGG16Trunk
from fastseg.testing import assert_within_policy
from tests.models.plain_fcn import UPSAMPLING_LAYERS, PlainFCN, crop_offsets, vgg16_in_torchvision_layout
from tests.models.verification import outputs_and_gradients, together

NETWORKS = {"32s": FCN32s, "16s": FCN16s, "8s": FCN8s, "8s at-once": FCN8sAtOnce}
WIDTH = 1 / 32


def randomised(model):
    """Random values everywhere (new score layers are zero), scaled so that signals keep their size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return model


def plain_copy(model, network, dtype):
    """A `PlainFCN` with the weights of `model`."""
    plain = PlainFCN(network, model.padding, model.upsampling == "interp", model.num_classes, WIDTH)
    weights = model.state_dict()
    trunk = [name for name in weights if name.startswith("conv")]
    own = plain.state_dict()
    features = [name for name in own if name.startswith("features")]
    renamed = dict(zip(features, trunk, strict=True))
    plain.load_state_dict({name: weights[renamed.get(name, name)] for name in own})
    return plain.to(dtype)


@pytest.mark.parametrize("upsampling", ["fixed", "learned", "interp"])
@pytest.mark.parametrize("padding, size", [("pad100", (37, 61)), ("same", (64, 96)), ("same", (45, 73))])
@pytest.mark.parametrize("network", NETWORKS)
def test_equals_a_plain_build_forward_and_backward(network, padding, size, upsampling):
    arguments = dict(padding=padding, upsampling=upsampling, width_multiplier=WIDTH)
    model = randomised(NETWORKS[network](5, **arguments)).eval()
    stock = plain_copy(model, network, torch.float32)
    exact = plain_copy(model, network, torch.float64)
    if upsampling == "fixed":
        for plain in (stock, exact):
            for name in UPSAMPLING_LAYERS[network]:
                plain.get_submodule(name).requires_grad_(False)

    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 3, *size, generator=generator)
    grad_output = torch.randn(2, 5, *size, generator=generator)
    ours = outputs_and_gradients(model, image, grad_output)
    theirs = outputs_and_gradients(stock, image, grad_output)
    truth = outputs_and_gradients(exact, image.double(), grad_output.double())
    assert truth[0].abs().max() > 0.1, "a vanishing output would prove nothing"
    assert_within_policy(ours[0], theirs[0], truth[0], "output")
    # Together: upsampling sums in another order than stock's, and the rounding of a few numbers is a matter of luck.
    gradients = [(ours[1], theirs[1], truth[1])]
    names = [name for name, gradient in theirs[2].items() if gradient is not None]
    own_names = [name for name, gradient in ours[2].items() if gradient is not None]
    assert len(own_names) == len(names)
    trunk = [name for name in names if name.startswith("features")]
    for name in own_names:
        stock_name = trunk.pop(0) if name.startswith("conv") else name
        gradients.append((ours[2][name], theirs[2][stock_name], truth[2][stock_name]))
    assert_within_policy(*together(gradients), "all gradients")


@pytest.mark.parametrize(
    "network, transposed, interpolated",
    [("32s", [19], [3]), ("16s", [5, 27], [6, 3]), ("8s", [5, 9, 31], [6, 12, 3])],
)
def test_affine_rule_gives_the_published_offsets(network, transposed, interpolated):
    assert crop_offsets(network) == transposed
    assert crop_offsets(network, interpolated=True) == interpolated


@pytest.mark.parametrize(
    "network, parameters",
    [("32s", 134_346_581), ("16s", 134_357_354), ("8s", 134_362_751), ("8s at-once", 134_362_751)],
)
@pytest.mark.parametrize("padding", ["pad100", "same"])
def test_full_size_parameters_names_and_shapes(network, parameters, padding):
    with torch.device("meta"):
        model = NETWORKS[network](padding=padding)
        image = torch.empty(1, 3, 500, 500)
    layers = UPSAMPLING_LAYERS[network]
    counted = {name: p for name, p in model.named_parameters() if name.partition(".")[0] not in layers}
    assert sum(parameter.numel() for parameter in counted.values()) == parameters
    assert model(image).shape == (1, 21, 500, 500)

    blocks = [(1, 2), (2, 2), (3, 3), (4, 3), (5, 3)]
    names = [f"conv{block}_{index}" for block, count in blocks for index in range(1, count + 1)]
    names += ["fc6", "fc7", "score_fr"] + ([] if network == "32s" else ["score_pool4"])
    names += ["score_pool3"] if network.startswith("8s") else []
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    expected |= {f"{name}.weight" for name in layers}
    state = model.state_dict()
    assert set(state) == expected
    assert state["fc6.weight"].shape == (4096, 512, 7, 7)
    assert state["fc7.weight"].shape == (4096, 4096, 1, 1)
    for name, stride in layers.items():
        assert state[f"{name}.weight"].shape == (21, 21, 2 * stride, 2 * stride)


@pytest.mark.parametrize("network, coarse", [("32s", 16), ("16s", 34), ("8s", 70)])
def test_score_map_of_500_pixels(network, coarse):
    with torch.device("meta"):
        scores = NETWORKS[network]().coarse_scores(torch.empty(1, 3, 500, 500))
    assert scores.shape[2:] == (coarse, coarse)


@pytest.mark.parametrize("network, coarse", [("32s", 7), ("16s", 14), ("8s", 28)])
def test_score_map_of_224_pixels_same_padding(network, coarse):
    with torch.device("meta"):
        scores = NETWORKS[network](padding="same").coarse_scores(torch.empty(1, 3, 224, 224))
    assert scores.shape[2:] == (coarse, coarse)


@pytest.mark.parametrize("upsampling", ["fixed", "interp"])
@pytest.mark.parametrize("padding", ["pad100", "same"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_size_comes_back_as_it_went_in(network, padding, upsampling):
    with torch.device("meta"):
        arguments = dict(padding=padding, upsampling=upsampling, width_multiplier=WIDTH)
        model = NETWORKS[network](2, 1, **arguments)
        for height in range(1, 67):
            width = 1 + 7 * height % 131
            assert model(torch.empty(1, 1, height, width)).shape == (1, 2, height, width)


def test_fully_connected_layers_equal_their_convolutions_at_224_pixels():
    width = 1 / 16
    torch.manual_seed(0)
    stock = vgg16_in_torchvision_layout(width).eval()
    image = torch.randn(1, 3, 224, 224)
    trunk = VGG16Trunk(3, width, first_padding=1, fc6_padding=0, dropout=0.5).eval()
    trunk.load_vgg16(stock.state_dict())
    same = FCN32s(padding="same", width_multiplier=width).eval().load_vgg16(stock.state_dict())

    def fc7(net, image):
        return net["classifier"][:5](net["features"](image).flatten(1))

    expected = fc7(stock, image)
    convolved = trunk.features(image)[2]
    centre = same.features(image)[2][:, :, 3, 3]
    exact = fc7(stock.double(), image.double())
    assert convolved.shape == (1, int(4096 * width), 1, 1)
    assert_within_policy(convolved.flatten(1), expected, exact, "fc7 as a convolution")
    assert_within_policy(centre, expected, exact, "centre of fc7 under same padding")


def test_load_vgg16_maps_every_layer():
    source = vgg16_in_torchvision_layout(WIDTH)
    assert [name for name in source.state_dict() if name.endswith("weight")] == [
        *(f"features.{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        *(f"classifier.{i}.weight" for i in (0, 3, 6)),
    ]
    model = FCN8s(width_multiplier=WIDTH)
    assert model.load_vgg16(source.state_dict()) is model
    loaded = [value for name, value in model.state_dict().items() if name.startswith(("conv", "fc"))]
    given = list(source.state_dict().values())[: len(loaded)]
    for ours, theirs in zip(loaded, given, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())


def test_load_vgg16_refuses_what_does_not_fit_and_copies_nothing():
    model = FCN32s(width_multiplier=WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = vgg16_in_torchvision_layout(WIDTH).state_dict()
    with pytest.raises(RuntimeError, match=r"lacks classifier\.3\.bias, features\.0\.weight"):
        absent = ("classifier.3.bias", "features.0.weight")
        model.load_vgg16({key: value for key, value in good.items() if key not in absent})
    with pytest.raises(RuntimeError, match=r"classifier\.3\.weight has shape \(2, 2\)"):
        model.load_vgg16({**good, "classifier.3.weight": torch.zeros(2, 2)})
    transposed = {**good, "classifier.0.weight": good["classifier.0.weight"].T}
    with pytest.raises(RuntimeError, match=r"classifier\.0\.weight has shape .* allowed for fc6\.weight"):
        model.load_vgg16(transposed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_initialisation():
    torch.manual_seed(0)
    model = FCN8s(4, width_multiplier=0.25)
    for name, parameter in model.named_parameters():
        layer, kind = name.split(".")
        if layer.startswith("score") or kind == "bias":
            assert parameter.count_nonzero() == 0, name
        elif not layer.startswith("upscore"):
            expected = (2 / parameter[0].numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.2), name
    # factor 2: taps 1/4, 3/4, 3/4, 1/4, on the diagonal only
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
    expected = torch.einsum("ab,i,j->abij", torch.eye(4), taps, taps)
    assert torch.equal(model.upscore2.weight.detach(), expected)
    for name, stride in UPSAMPLING_LAYERS["8s"].items():
        weight = model.get_submodule(name).weight
        assert weight.sum((1, 2, 3)).tolist() == pytest.approx([stride**2] * 4)


@pytest.mark.parametrize("upsampling, trained", [("fixed", False), ("learned", True)])
def test_only_learned_upsampling_is_trained(upsampling, trained):
    model = randomised(FCN16s(2, upsampling=upsampling, padding="same", width_multiplier=WIDTH))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(1, 3, 32, 32)).square().mean().backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (trained or not name.startswith("upscore")), name


@pytest.mark.parametrize("padding", ["pad100", "same"])
@pytest.mark.parametrize("network, border", [("32s", 16), ("16s", 28), ("8s", 28)])
def test_interpolation_equals_fixed_upsampling_in_the_interior(network, border, padding):
    torch.manual_seed(0)
    arguments = dict(padding=padding, width_multiplier=WIDTH)
    fixed = NETWORKS[network](3, upsampling="fixed", **arguments)
    for name, parameter in fixed.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter)
    interpolated = NETWORKS[network](3, upsampling="interp", **arguments)
    missing, unexpected = interpolated.load_state_dict(fixed.state_dict(), strict=False)
    assert not missing and {name.partition(".")[0] for name in unexpected} == set(UPSAMPLING_LAYERS[network])
    fixed, interpolated = fixed.double().eval(), interpolated.double().eval()
    image = torch.randn(1, 3, 128, 160, dtype=torch.float64)
    inside = (..., slice(border, -border), slice(border, -border))
    expected, ours = fixed(image), interpolated(image)
    assert (ours[inside] - expected[inside]).abs().max() <= 1e-12 * expected.abs().max()
    assert (ours - expected).abs().max() > 1e-3 * expected.abs().max(), "the border fades"


def test_coarse_scores_upsample_to_the_output():
    model = randomised(FCN8s(3, padding="same", upsampling="interp", width_multiplier=WIDTH)).eval()
    image = torch.randn(2, 3, 64, 96)
    coarse = model.coarse_scores(image)
    assert coarse.shape == (2, 3, 8, 12)
    upsampled = F.interpolate(coarse, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(image), upsampled)


def test_weights_move_between_paddings_and_from_coarse_to_fine():
    coarse = randomised(FCN32s(2, width_multiplier=WIDTH, upsampling="learned"))
    FCN32s(2, width_multiplier=WIDTH, padding="same").load_state_dict(coarse.state_dict())
    fine = FCN16s(2, width_multiplier=WIDTH)
    missing, unexpected = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert unexpected == ["upscore.weight"]
    assert set(missing) == {"upscore2.weight", "upscore16.weight", "score_pool4.weight", "score_pool4.bias"}


def test_dropout_only_while_training():
    model = randomised(FCN32s(2, padding="same", width_multiplier=WIDTH, dropout=0.5))
    image = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_classes=0), "num_classes is 0; allowed: 1 or more"),
        (dict(in_channels=0), "in_channels is 0; allowed: 1 or more"),
        (dict(padding="valid"), "padding is 'valid'; allowed: pad100, same"),
        (dict(upsampling="bicubic"), "upsampling is 'bicubic'; allowed: fixed, learned, interp"),
        (dict(width_multiplier=0), "width_multiplier is 0; allowed: above 0"),
        (dict(dropout=1.5), "dropout"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FCN8s(**{"width_multiplier": WIDTH, **arguments})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 32)])
def test_bad_images_are_named(shape):
    model = FCN32s(width_multiplier=WIDTH)
    with pytest.raises(RuntimeError, match=r"FCN32s: image has shape .*; allowed: \(N, 3, H, W\)"):
        model(torch.zeros(shape))
