"""Our FCN and DeepLab v3 on ResNet against torchvision's: keys, checkpoints, scores and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import DeepLabV3Torchvision, FCNResNet
from fastseg.testing import assert_within_policy
from tests.models.verification import randomised

torchvision = pytest.importorskip("torchvision")
NETWORKS = {FCNResNet: "fcn_resnet", DeepLabV3Torchvision: "deeplabv3_resnet"}
every_network = pytest.mark.parametrize("network", NETWORKS)


def theirs(network, layers=50):
    build = getattr(torchvision.models.segmentation, f"{NETWORKS[network]}{layers}")
    return build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)


def pair(network, layers=50):
    """(ours, theirs, theirs in fp64) with the same weights, without dropout."""
    ours = randomised(network(layers=layers))
    with torch.device("meta"):  # random values would take longer than the tests
        other = theirs(network, layers)
    other.load_state_dict({key: value.clone() for key, value in ours.state_dict().items()}, assign=True)
    models = [ours, other, copy.deepcopy(other).double()]
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    return models


@every_network
@pytest.mark.parametrize("layers", (50, 101))
def test_checkpoints_load_both_ways(network, layers):
    with torch.device("meta"):
        ours, other = network(layers=layers), theirs(network, layers)
    assert list(ours.state_dict()) == list(other.state_dict())
    ours.load_state_dict(other.state_dict(), assign=True)
    other.load_state_dict(ours.state_dict(), assign=True)


@every_network
def test_trunks_load(network):
    trunk = randomised(torchvision.models.resnet50(weights=None))
    model = network(layers=50).load_imagenet(trunk.state_dict())
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, trunk.state_dict()[key])


@every_network
@pytest.mark.parametrize("layers", (50, 101))
def test_scores_and_gradients_are_equal(network, layers):
    """Gradients in fp64: in fp32 one of a million ReLUs has an input so near to 0 that its rounding decides."""
    image = torch.randn(1, 3, 49, 33, generator=torch.Generator().manual_seed(1))
    ours, other, exact = (model.eval() for model in pair(network, layers))
    with torch.no_grad():
        assert_within_policy(ours(image), other(image)["out"], exact(image.double())["out"], "scores")
    found, expected = (gradients_in_fp64(model.double(), image) for model in (ours, exact))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        assert (found[name] - gradient).abs().max() < 1e-8 * gradient.abs().max(), name


def gradients_in_fp64(model, image):
    image = image.double().requires_grad_()
    scores = model(image)
    scores = scores["out"] if isinstance(scores, dict) else scores
    scores.backward(torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    parameters = {name: value.grad for name, value in model.named_parameters() if not name.startswith("aux_")}
    return {"image": image.grad} | parameters


@every_network
def test_scores_of_both_heads_are_equal_in_training(network):
    image = torch.randn(2, 3, 49, 65, generator=torch.Generator().manual_seed(1))
    ours, other, exact = (model.train() for model in pair(network))
    found = [F.interpolate(maps, (49, 65), mode="bilinear") for maps in ours.score_maps(image)]
    other, exact = other(image), exact(image.double())
    for scores, name in zip(found, ("out", "aux"), strict=True):
        assert_within_policy(scores, other[name], exact[name], name)
