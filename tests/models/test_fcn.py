"""FCN on VGG16: its variants, and the facts of the release."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import FCN8s, FCN8sAtOnce, FCN16s, FCN32s
from fastseg.models.blocks.vgg16 import FullyConvolutionalVGG16
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he
from tests.models.stock_fcn import UPSAMPLING_LAYERS, StockFCN, crop_offsets, vgg16_in_torchvision_layout
from tests.models.verification import randomised

NETWORKS = {"32s": FCN32s, "16s": FCN16s, "8s": FCN8s, "8s at-once": FCN8sAtOnce}
PARAMETERS = {"32s": 134_346_581, "16s": 134_357_354, "8s": 134_362_751, "8s at-once": 134_362_751}
WIDTH = 1 / 32
VGG16 = [f"conv{stage}_{layer}" for stage, layers in enumerate((2, 2, 3, 3, 3), 1) for layer in range(1, layers + 1)]


def keys(network, upsampling):
    names = [*VGG16, "fc6", "fc7", "score_fr"] + ([] if network == "32s" else ["score_pool4"])
    names += ["score_pool3"] if network.startswith("8s") else []
    found = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    return found + ([] if upsampling == "interp" else [f"{name}.weight" for name in UPSAMPLING_LAYERS[network]])


def keys_of_stock(model, stock):
    features = [key for key in stock.state_dict() if key.startswith("features")]
    trunk = [key for key in model.state_dict() if key.startswith("conv")]
    return {key: key for key in stock.state_dict()} | dict(zip(features, trunk, strict=True))


def deviation(key, layer):
    """Scores start at zero; `test_upsampling_starts_bilinear` checks the upsampling."""
    return None if key.startswith("upscore") else 0.0 if key.startswith("score") else he(layer)


def contract(network, padding, upsampling):
    return Contract(
        NETWORKS[network],
        lambda classes=CLASSES, width=WIDTH: StockFCN(network, padding, upsampling == "interp", classes, width),
        sizes=((37, 61),) if padding == "pad100" else ((96, 64), (45, 73)),
        name=f"FCN-{network} {padding} {upsampling}",
        arguments=dict(padding=padding, upsampling=upsampling, width_multiplier=WIDTH),
        keys_of_stock=keys_of_stock,
        training=False,  # only dropout differs
        summed_alike=False,
        deep=False,
        parameters=((dict(padding=padding, upsampling=upsampling), PARAMETERS[network]),),
        keys=keys(network, upsampling),
        uncounted=("upscore",),
        deviation=deviation,
        bad_arguments=(
            (dict(padding="valid"), "padding is 'valid'; allowed: pad100, same"),
            (dict(upsampling="bicubic"), "upsampling is 'bicubic'; allowed: fixed, learned, interp"),
        ),
    )


VARIANTS = [("pad100", "fixed"), ("same", "fixed"), ("same", "learned"), ("pad100", "interp"), ("same", "interp")]
CONTRACTS = [
    contract(network, *variant) for network in NETWORKS for variant in VARIANTS[: 2 if network == "8s at-once" else 5]
]


@pytest.mark.parametrize(
    "network, transposed, interpolated",
    [("32s", [19], [3]), ("16s", [5, 27], [6, 3]), ("8s", [5, 9, 31], [6, 12, 3])],
)
def test_affine_rule_gives_the_published_offsets(network, transposed, interpolated):
    assert crop_offsets(network) == transposed
    assert crop_offsets(network, interpolated=True) == interpolated


@pytest.mark.parametrize("padding", ["pad100", "same"])
@pytest.mark.parametrize("network", NETWORKS)
def test_shapes_at_full_size(network, padding):
    with torch.device("meta"):
        model = NETWORKS[network](padding=padding)
        assert model(torch.empty(1, 3, 500, 500)).shape == (1, 21, 500, 500)
    state = model.state_dict()
    assert state["fc6.weight"].shape == (4096, 512, 7, 7)
    assert state["fc7.weight"].shape == (4096, 4096, 1, 1)
    for name, stride in UPSAMPLING_LAYERS[network].items():
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


def test_fully_connected_layers_equal_their_convolutions_at_224_pixels():
    width = 1 / 16
    torch.manual_seed(0)
    stock = vgg16_in_torchvision_layout(width).eval()
    image = torch.randn(1, 3, 224, 224)
    same = FCN32s(padding="same", width_multiplier=width).eval().load_imagenet(stock.state_dict())
    trunk = FullyConvolutionalVGG16(3, width, first_padding=1, fc6_padding=0, dropout=0.5).eval()
    trunk.load_state_dict(same.trunk.state_dict())

    def fc7(net, image):
        return net["classifier"][:5](net["features"](image).flatten(1))

    expected = fc7(stock, image)
    convolved = trunk(image)[2]
    centre = same.features(image)[2][:, :, 3, 3]
    exact = fc7(stock.double(), image.double())
    assert convolved.shape == (1, int(4096 * width), 1, 1)
    assert_within_policy(convolved.flatten(1), expected, exact, "fc7 as a convolution")
    assert_within_policy(centre, expected, exact, "centre of fc7 under same padding")


def test_load_imagenet_maps_every_layer():
    source = vgg16_in_torchvision_layout(WIDTH)
    assert [name for name in source.state_dict() if name.endswith("weight")] == [
        *(f"features.{i}.weight" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        *(f"classifier.{i}.weight" for i in (0, 3, 6)),
    ]
    model = FCN8s(width_multiplier=WIDTH)
    assert model.load_imagenet(source.state_dict()) is model
    loaded = [value for name, value in model.state_dict().items() if name.startswith(("conv", "fc"))]
    given = list(source.state_dict().values())[: len(loaded)]
    for ours, theirs in zip(loaded, given, strict=True):
        assert torch.equal(ours.flatten(), theirs.flatten())


def test_load_imagenet_refuses_what_does_not_fit_and_copies_nothing():
    model = FCN32s(width_multiplier=WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = vgg16_in_torchvision_layout(WIDTH).state_dict()
    with pytest.raises(RuntimeError, match=r"lacks classifier\.3\.bias, features\.0\.weight"):
        absent = ("classifier.3.bias", "features.0.weight")
        model.load_imagenet({key: value for key, value in good.items() if key not in absent})
    with pytest.raises(RuntimeError, match=r"classifier\.3\.weight has shape \(2, 2\)"):
        model.load_imagenet({**good, "classifier.3.weight": torch.zeros(2, 2)})
    transposed = {**good, "classifier.0.weight": good["classifier.0.weight"].T}
    with pytest.raises(RuntimeError, match=r"classifier\.0\.weight has shape .* allowed for fc6\.weight"):
        model.load_imagenet(transposed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_upsampling_starts_bilinear():
    model = FCN8s(4, width_multiplier=WIDTH)
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


@pytest.mark.parametrize("network", NETWORKS)
def test_interpolated_scores_are_never_made_for_losses_and_labels(network, monkeypatch):
    model = randomised(NETWORKS[network](3, padding="same", upsampling="interp", width_multiplier=WIDTH)).eval()
    images, targets = torch.randn(1, 3, 64, 96), torch.randint(3, (1, 64, 96))
    scores = model(images)
    monkeypatch.setattr(model, "forward", lambda image: pytest.fail("scores of full size"))
    torch.testing.assert_close(model.loss(images, targets), F.cross_entropy(scores, targets))
    assert (model.predict(images) == scores.argmax(1)).float().mean() > 0.999
    with pytest.raises(RuntimeError, match="targets have shape"):
        model.loss(images, targets[..., 1:])
    with pytest.raises(pytest.fail.Exception, match="full size"):
        model.predict(images[..., :-1])


def test_weights_move_between_paddings_and_from_coarse_to_fine():
    coarse = randomised(FCN32s(2, width_multiplier=WIDTH, upsampling="learned"))
    FCN32s(2, width_multiplier=WIDTH, padding="same").load_state_dict(coarse.state_dict())
    fine = FCN16s(2, width_multiplier=WIDTH)
    missing, unexpected = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert unexpected == ["upscore.weight"]
    assert set(missing) == {"upscore2.weight", "upscore16.weight", "score_pool4.weight", "score_pool4.bias"}
