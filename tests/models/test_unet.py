"""U-Net in three forms: sizes, losses, and the weights of the pixels between cells."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg.models import UNetAarhus, UNetSame, UNetValid, border_weight_map
from tests.models.contract import CLASSES, Contract, same_keys
from tests.models.stock_unet import StockUNetAarhus, StockUNetSame, StockUNetValid
from tests.models.verification import called_modules, randomised

WIDTH = 1 / 16


def mirrored(image, top, bottom, left, right):
    """The image continued by numpy, also where it is smaller than what is added."""
    height, width = image.shape[2:]
    places = np.pad(np.arange(height * width).reshape(height, width), ((top, bottom), (left, right)), mode="reflect")
    return image.flatten(2)[..., torch.from_numpy(places)]


class MirroredStockUNet(StockUNetValid):
    """At the size of the image, which is mirrored by 92 pixels and to a size that fits."""

    def forward(self, image):
        height, width = image.shape[2:]
        missing = [next(n for n in range(16) if (size + 184 + n) % 16 == 12) for size in (height, width)]
        scores = super().forward(mirrored(image, 92, 92 + missing[0], 92, 92 + missing[1]))
        return scores[:, :, :height, :width]


def linear_dice(scores, target):
    """The mean over the classes, without the pixels of label 255."""
    valid = target != 255
    probabilities = scores.softmax(1).movedim(1, -1)[valid]
    truth = F.one_hot(target[valid], scores.shape[1]).to(scores.dtype)
    both, either = (probabilities * truth).sum(0), (probabilities + truth).sum(0)
    return (1 - (2 * both + 1e-6) / (either + 1e-6)).mean()


def cross_entropy_and_dice(stock, image, target):
    scores = stock(image)
    return F.cross_entropy(scores, target, ignore_index=255) + linear_dice(scores, target)


def keys_at_full_size(stock, **arguments):
    with torch.device("meta"):
        return list(stock(21, **arguments).state_dict())


NORMS = ((dict(norm="group"), "norm is 'group'; allowed: batch, sync, frozen"),)
CONTRACTS = [
    Contract(
        UNetValid,
        lambda classes=CLASSES, width=WIDTH: MirroredStockUNet(classes, width, 3, dropout=0.0),
        sizes=((20, 36), (33, 46)),
        arguments=dict(in_channels=3, width_multiplier=WIDTH),
        training=False,  # only dropout differs
        summed_alike=False,
        parameters=(
            ({}, 31_030_658),
            (dict(in_channels=3), 31_031_810),
            (dict(num_classes=21, in_channels=3), 31_033_045),
        ),
        keys=keys_at_full_size(StockUNetValid),
    ),
    Contract(
        UNetSame,
        lambda classes=CLASSES, width=WIDTH: StockUNetSame(classes, width),
        sizes=((48, 32), (45, 39)),
        arguments=dict(width_multiplier=WIDTH),
        keys_of_stock=same_keys,
        stock_loss=cross_entropy_and_dice,
        summed_alike=False,
        smallest=16,
        parameters=(({}, 31_037_698), (dict(num_classes=1), 31_037_633)),
        keys=keys_at_full_size(StockUNetSame),
        bad_arguments=NORMS,
    ),
    Contract(
        UNetSame,
        lambda classes=CLASSES, width=WIDTH: StockUNetSame(classes, width, interpolated=True),
        sizes=((45, 39),),
        name="UNetSame bilinear",
        arguments=dict(width_multiplier=WIDTH, bilinear=True),
        keys_of_stock=same_keys,
        stock_loss=cross_entropy_and_dice,
        summed_alike=False,
        smallest=16,
        parameters=((dict(num_classes=1, bilinear=True), 17_262_977),),  # of the release
        keys=keys_at_full_size(StockUNetSame, interpolated=True),
    ),
    Contract(
        UNetAarhus,
        lambda classes=CLASSES, width=1 / 4: StockUNetAarhus(classes, width, sigmoid=False),
        sizes=((48, 32), (45, 39)),
        arguments=dict(width_multiplier=1 / 4),
        keys_of_stock=same_keys,
        summed_alike=False,
        smallest=16,
        parameters=(({}, 2_161_649), (dict(in_channels=1), 2_161_361)),
        keys=keys_at_full_size(StockUNetAarhus),
        bad_arguments=NORMS,
    ),
]


def image_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size, left", [(572, 388), (588, 404), (188, 4)])
def test_tiles_lose_184_pixels(size, left):
    with torch.device("meta"):
        assert UNetValid().tile_scores(torch.empty(1, 1, size, 188)).shape == (1, 2, left, 4)


@pytest.mark.parametrize("size", [(571, 572), (572, 580), (172, 188)])
def test_tiles_that_do_not_fit_are_named(size):
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"UNetValid: tile has .* H and W of 188 \+ 16 k"):
        UNetValid().tile_scores(torch.empty(1, 1, *size))


def test_a_tile_gets_the_scores_that_it_has_in_the_image():
    """Overlapping tiles: 100 x 148 pixels from the middle of an image."""
    model = randomised(UNetValid(2, 1, width_multiplier=WIDTH)).eval()
    image = image_of(1, 1, 292, 340)
    with torch.no_grad():
        whole = model(image)[:, :, 96:196, 96:244]
        tile = model.tile_scores(image[:, :, 4:288, 4:336])
    assert tile.shape == whole.shape
    torch.testing.assert_close(tile, whole)


def test_sizes_of_the_lecture():
    with torch.device("meta"):
        calls = called_modules(UNetAarhus(), torch.empty(2, 3, 128, 128))
    shapes = dict(calls)
    assert [shapes[f"c{level}.4"][1:] for level in range(1, 10)] == [
        (16, 128, 128), (32, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8),
        (128, 16, 16), (64, 32, 32), (32, 64, 64), (16, 128, 128),
    ]  # fmt: skip
    assert shapes["out"] == (2, 1, 128, 128)


def one_class(network):
    model = randomised(network(1, width_multiplier=1 / 8)).eval()
    image = image_of(2, 3, 32, 48)
    target = torch.randint(2, (2, 32, 48), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    target[0, :4] = 255
    scores = model(image).detach()[:, 0]
    return model, image, target, scores


@pytest.mark.parametrize("network, dice", [(UNetAarhus, 0), (UNetSame, 1)])
def test_loss_of_one_class(network, dice):
    model, image, target, scores = one_class(network)
    valid = target != 255
    truth, probability = target[valid].float(), scores.sigmoid()[valid]
    expected = F.binary_cross_entropy(probability, truth)
    overlap = 2 * (probability * truth).sum() / (probability.sum() + truth.sum())
    torch.testing.assert_close(model.loss(image, target), expected + dice * (1 - overlap))


@pytest.mark.parametrize("network", [UNetAarhus, UNetSame])
def test_one_class_is_predicted_above_a_half(network):
    model, image, _, scores = one_class(network)
    labels = model.predict(image)
    assert labels.dtype == torch.uint8 and labels.float().mean() not in (0, 1)
    assert torch.equal(labels.bool(), scores.sigmoid() > 0.5)


def test_weights_of_pixels_in_the_loss():
    model, image = randomised(UNetValid(2, width_multiplier=WIDTH)).eval(), image_of(1, 1, 20, 24)
    cells = torch.zeros(20, 24, dtype=torch.int64)
    cells[2:9, 3:8], cells[5:12, 10:20] = 1, 2
    weights, target = border_weight_map(cells)[None], (cells > 0).long()[None]
    losses = F.cross_entropy(model(image), target, reduction="none")
    assert weights.max() > 2 * weights.min()
    torch.testing.assert_close(
        model.loss(image, target, pixel_weight=weights), (weights * losses).sum() / weights.sum()
    )


@pytest.mark.parametrize(
    "distance, weight", [(1, 9.231163), (2, 7.261490), (3, 4.867523), (5, 1.353353), (10, 0.003355)]
)
def test_published_weights(distance, weight):
    cells = torch.zeros(3, 2 * distance + 1, dtype=torch.uint8)
    cells[:, 0], cells[:, -1] = 1, 2
    assert border_weight_map(cells, balance=False)[1, distance].item() == pytest.approx(1 + weight, abs=1e-6)


def test_weights_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    cells = torch.zeros(40, 50, dtype=torch.int32)
    for number, (top, left) in enumerate(torch.randint(35, (6, 2), generator=generator).tolist(), 3):
        cells[top : top + 5, left : left + 6] = number
    cells[20, 45:] = 99
    weights = border_weight_map(cells, border_weight=7.0, sigma=3.0)
    inside = cells > 0
    numbers = [number for number in cells.unique().tolist() if number]
    for y, x in torch.cartesian_prod(torch.arange(0, 40, 3), torch.arange(0, 50, 3)).tolist():
        expected = cells.numel() / (2 * (inside == inside[y, x]).sum().item())
        if not inside[y, x]:
            nearest = sorted(
                min(math.dist((y, x), place) for place in (cells == number).nonzero().tolist()) for number in numbers
            )
            expected += 7 * math.exp(-((nearest[0] + nearest[1]) ** 2) / 18)
        assert weights[y, x].item() == pytest.approx(expected, rel=1e-5), (y, x)


def test_weights_without_gaps():
    cells = torch.zeros(6, 8, dtype=torch.int64)
    assert torch.equal(border_weight_map(cells), torch.full((6, 8), 0.5))
    cells[1:3, 1:7] = 5
    expected = torch.where(cells > 0, 48 / 24, 48 / 72)
    torch.testing.assert_close(border_weight_map(cells), expected)
    assert torch.equal(border_weight_map(cells, balance=False), torch.ones(6, 8))


def test_bad_arguments_of_the_weights_are_named():
    with pytest.raises(RuntimeError, match=r"instances has shape \(1, 4, 4\) .*allowed: \(H, W\) integers"):
        border_weight_map(torch.zeros(1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="sigma is 0; allowed: above 0"):
        border_weight_map(torch.zeros(4, 4, dtype=torch.int64), sigma=0)
