"""Semantic FPN: detectron2's keys, the sum at stride 4, padding to multiples of 32, and its parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models import PanopticFPN, SemanticFPN
from fastseg.models.blocks.fpn import FPN
from fastseg.models.blocks.resnet import ResNet
from fastseg.testing import assert_within_policy
from tests.models.contract import CLASSES, Contract, he, same_keys
from tests.models.stock_fpn import StockFPN, StockSemanticFPN, panoptic_merged
from tests.models.verification import assert_equal_networks, copied, loss_and_gradients, randomised

WIDTH = 1 / 16  # 8 channels in the branch: 2 groups of 4
LAYERS = 50


def image_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def stock_network(classes=CLASSES, width=WIDTH, **arguments):
    return StockSemanticFPN(classes, width, LAYERS, groups=round(32 * width), **arguments)


def deviation(key, layer):
    """The pyramid starts from Xavier's initialisation, the branch from He's with the fan out."""
    if key.startswith("backbone.fpn"):
        return (1 / layer.weight[0].numel()) ** 0.5
    return (2 / layer.weight[:, 0].numel()) ** 0.5 if key.startswith("sem_seg_head") else he(layer)


def full_size_keys():
    with torch.device("meta"):
        return list(StockSemanticFPN(depth=LAYERS).state_dict())


CONTRACTS = [
    Contract(
        SemanticFPN,
        stock_network,
        sizes=((64, 96), (61, 90)),
        arguments=dict(width_multiplier=WIDTH, layers=LAYERS),
        keys_of_stock=same_keys,
        summed_alike=False,
        parameters=((dict(layers=101), 47_470_803), (dict(layers=50), 28_478_675)),
        keys=full_size_keys(),
        deviation=deviation,
        bad_arguments=(
            (dict(layers=18), "layers is 18; allowed: 50, 101, 152"),
            (dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),
        ),
    )
]


def test_number_of_parameters_of_the_parts():
    with torch.device("meta"):
        network, panoptic = SemanticFPN(), PanopticFPN()
    count = {name: value.numel() for name, value in network.named_parameters()}
    assert sum(count.values()) == 47_470_803
    assert sum(value for name, value in count.items() if "fpn_" in name) == 3_344_384
    assert sum(value for name, value in count.items() if name.startswith("sem_seg_head")) == 1_626_259
    assert sum(value.numel() for value in panoptic.sem_seg_head.parameters()) == 1_630_774
    assert (panoptic.num_classes, network.num_classes) == (54, 19)
    assert {layer.num_groups for layer in network.modules() if isinstance(layer, nn.GroupNorm)} == {32}


def test_levels_and_their_sum_at_full_size():
    with torch.device("meta"):
        network = SemanticFPN().eval()
        image = torch.empty(1, 3, 512, 1024)
        levels = network.backbone(image)
        assert [tuple(level.shape) for level in levels] == [(1, 256, 512 // s, 1024 // s) for s in (4, 8, 16, 32)]
        for level, name in zip(levels, ("p2", "p3", "p4", "p5")):
            assert network.sem_seg_head.get_submodule(name)(level).shape == (1, 128, 128, 256)
        assert network.coarse_scores(image).shape == (1, 19, 128, 256)
        assert network.coarse_scores(torch.empty(1, 3, 481, 1000)).shape == (1, 19, 128, 256)


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_pyramid_with_p6_equals_a_stock_one(stride_in_1x1):
    model = FPN(ResNet(LAYERS, 3, WIDTH, stride_in_1x1=stride_in_1x1), 16, p6=True)
    stride_in = "1x1" if stride_in_1x1 else "3x3"
    stock, exact = (StockFPN(WIDTH, LAYERS, channels=16, stride_in=stride_in, p6=True).eval() for _ in range(2))
    network = randomised(SemanticFPN(width_multiplier=WIDTH, layers=LAYERS, stride_in_1x1=stride_in_1x1)).eval()
    model.load_state_dict(network.backbone.state_dict())
    values = {key.removeprefix("backbone."): value for key, value in network.state_dict().items()}
    for plain in (stock, exact):
        plain.load_state_dict({key: values[key] for key in plain.state_dict()})
    image = image_of(1, 3, 64, 128)
    with torch.no_grad():
        levels = model.eval()(image), stock(image), exact.double()(image.double())
    assert [tuple(level.shape[2:]) for level in levels[0]] == [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    for ours, theirs, truth in zip(*levels, strict=True):
        assert_within_policy(ours, theirs, truth, "level")


@pytest.mark.parametrize("options", [{}, dict(ignore_index=-100), dict(reduction="none"), dict(weight=True)])
def test_padding_counts_for_nothing_in_the_loss(options):
    """Also if the ignored label is not a uint8, with weights of pixels, and pixel by pixel."""
    network = randomised(SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS)).eval()
    image = image_of(2, 3, 33, 41)
    target = torch.randint(CLASSES, (2, 33, 41), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    weight = options.pop("weight", False) and torch.rand(2, 33, 41, generator=torch.Generator().manual_seed(4))
    given = dict(options) | ({"pixel_weight": weight} if weight is not False else {})

    def of_scores(network, image):
        loss = F.cross_entropy(network(image), target.long(), reduction="none")
        if weight is not False:
            loss = loss * weight.to(loss.dtype)
        return loss if options.get("reduction") == "none" else loss.mean()

    stock, exact = (copied(stock_network(), network, same_keys) for _ in range(2))
    with torch.no_grad():
        ours = network.loss(image, target, **given)
        theirs, truth = of_scores(stock, image), of_scores(exact.double(), image.double())
    if weight is not False:  # the mean is over the weights, see fastseg.ops.upsample_cross_entropy
        theirs, truth = (value * weight.numel() / weight.sum().to(value.dtype) for value in (theirs, truth))
    assert_within_policy(ours, theirs, truth, "loss")


def test_targets_of_another_size_are_named():
    network = SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS)
    with pytest.raises(
        RuntimeError, match=r"SemanticFPN.loss: targets have shape \(1, 40, 40\); allowed: \(1, 33, 33\)"
    ):
        network.loss(torch.zeros(1, 3, 33, 33), torch.zeros(1, 40, 40, dtype=torch.uint8))


def test_loads_detectron2s_checkpoint_without_counts_of_batches():
    """Its frozen batch normalisation has no ``num_batches_tracked``."""
    network = randomised(SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS, norm="frozen"))
    weights = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    other = SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS, norm="frozen")
    other.load_state_dict(dict(weights))
    for key, value in other.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_frozen_trunk_is_not_trained():
    network = randomised(SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS, norm="frozen")).train()
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    target = torch.zeros(2, 33, 33, dtype=torch.uint8)
    _, _, gradients = loss_and_gradients(network, lambda image: network.loss(image, target), image_of(2, 3, 33, 33))
    norms = [
        name for name, _ in network.backbone.bottom_up.named_parameters() if "bn" in name or "downsample.1" in name
    ]
    assert norms and not any(f"backbone.bottom_up.{name}" in gradients for name in norms)
    assert "sem_seg_head.p2.0.norm.weight" in gradients
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_load_imagenet_copies_every_layer_of_the_trunk():
    network = SemanticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS, stride_in_1x1=False)
    trunk = randomised(ResNet(LAYERS, 3, WIDTH)).eval()
    assert network.load_imagenet({**trunk.state_dict(), "fc.weight": torch.zeros(1)}) is network
    image = image_of(1, 3, 64, 64)
    for own, expected in zip(network.backbone.bottom_up.eval()(image), trunk(image), strict=True):
        assert torch.equal(own, expected)
    with pytest.raises(RuntimeError, match="SemanticFPN.load_imagenet: state_dict lacks layer4.2.conv3.weight"):
        network.load_imagenet({key: value for key, value in trunk.state_dict().items() if "4.2.conv3" not in key})


def test_panoptic_maps_of_a_batch():
    network = randomised(PanopticFPN(CLASSES, width_multiplier=WIDTH, layers=LAYERS)).eval()
    images = image_of(2, 3, 40, 50)
    mask = torch.zeros(1, 40, 50, dtype=torch.bool)
    mask[:, 3:20, 5:30] = True
    instance, nothing = (mask, torch.tensor([0.9]), torch.tensor([7])), (mask[:0], torch.zeros(0), torch.zeros(0))
    labels = network.predict(images)
    (first, segments), (second, stuff) = network.predict_panoptic(images, [instance, nothing], least_area=1)
    assert (segments[0].category, segments[0].is_thing, segments[0].area) == (7, True, 17 * 25)
    assert first[mask[0]].eq(1).all()
    assert {segment.category for segment in stuff} == set(labels[1].unique().tolist()) - {0}
    assert torch.equal(second == 0, labels[1] == 0)
    assert len(stuff) > 1


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_panoptic_fpn_equals_a_stock_network(training):
    """With all its classes, and the stride of a block where torchvision has it."""
    network = randomised(PanopticFPN(width_multiplier=WIDTH, layers=LAYERS, stride_in_1x1=False)).train(training)
    stock, exact = (copied(stock_network(54, stride_in="3x3"), network, same_keys) for _ in range(2))
    keys = same_keys(network, stock)
    assert_equal_networks(network, stock, exact.double(), image_of(2, 3, 61, 90), keys, alike=False, deep=True)


def test_panoptic_maps_equal_those_of_a_stock_network():
    network = randomised(PanopticFPN(width_multiplier=WIDTH, layers=LAYERS)).eval()
    images = image_of(1, 3, 40, 50)
    masks = torch.zeros(2, 40, 50, dtype=torch.bool)
    masks[0, 3:20, 5:30] = masks[1, 15:33, 20:44] = True
    instances = masks, torch.tensor([0.7, 0.9]), torch.tensor([7, 3])
    ((found, segments),) = network.predict_panoptic(images, [instances], least_area=20)
    with torch.no_grad():
        (labels,) = copied(stock_network(54), network, same_keys)(images).argmax(1)
    expected, listed = panoptic_merged(*(values.numpy() for values in (*instances, labels)), least_area=20)
    assert torch.equal(found, torch.from_numpy(expected).int())
    assert [(segment.category, segment.is_thing) for segment in segments] == [
        (segment["category"], segment["isthing"]) for segment in listed
    ]
    assert len(segments) > 4
