"""Inference by tiles and over several sizes: equal to the whole image, and to the average written plainly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastseg.inference import multi_scale, tiled
from fastseg.metrics import progress as progress_bar
from fastseg.models import FCNResNet, SegNetBasic, SemanticFPN, UNetValid
from fastseg.models.blocks.mirroring import mirrored
from fastseg.models.coarse import CoarseNetwork
from fastseg.testing import assert_within_policy
from tests.models.verification import randomised

CLASSES = 5
NARROW = dict(num_classes=CLASSES, width_multiplier=1 / 32)


def image_of(*shape):
    """Smooth, so that scores have clear maxima."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(noise, 3, 1, 1, count_include_pad=False)


class Coarse(CoarseNetwork):
    """Scores at every fourth pixel, from 9 x 9 pixels."""

    def __init__(self, num_classes=CLASSES, align_corners=False, size_divisor=1):
        super().__init__(num_classes, 3)
        self.align_corners, self.size_divisor = align_corners, size_divisor
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, num_classes, 3, 2, 1))
        self.sizes = []

    def score_maps(self, image):
        self.sizes.append(tuple(image.shape))
        return (self.layers(image),)


class Fine(CoarseNetwork):
    """Scores of the size of the image, from 5 x 5 pixels; `valid` pads nothing."""

    def __init__(self, num_classes=CLASSES):
        super().__init__(num_classes, 3)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, num_classes, 3)

    def valid(self, image):
        return self.second(torch.tanh(self.first(image)))

    def score_maps(self, image):
        return (self.valid(F.pad(image, (2, 2, 2, 2))),)


def randomly(network):
    torch.manual_seed(0)
    return randomised(network).eval()


# --- tiles ---


@pytest.mark.parametrize("tile, overlap", [(16, 4), (16, 7), (9, 8), ((20, 12), (4, 10)), (64, 4), (5, 4)])
def test_tiles_that_see_enough_give_the_labels_of_the_whole_image(tile, overlap):
    """Of an image whose borders are mirrored, as the tiles see them."""
    network, images = randomly(Fine()), image_of(2, 3, 31, 45)
    expected = network.valid(mirrored(images, (2, 2), (2, 2))).argmax(1)
    for function in (network, network.valid, lambda tile: network.valid(tile).argmax(1)):
        labels = tiled(function, images, tile, overlap)
        assert labels.dtype == torch.uint8 and torch.equal(labels.long(), expected)
    assert expected.unique().numel() > 1


def test_tiles_of_a_network_that_pads_nothing_may_be_cut_further():
    network, images = randomly(Fine()), image_of(1, 3, 31, 45)
    assert torch.equal(tiled(network.valid, images, 16, 4), tiled(network.valid, images, 20, 9))
    with pytest.raises(ValueError, match="tiled: overlap is 3; allowed: 4 or more, since the network returns 12 of 16"):
        tiled(network.valid, images, 16, 3)


def test_overlap_tiles_of_the_original_unet():
    """Its tiles of 252 pixels give 68; with an overlap of 188 their poolings lie where those of the whole image do."""
    network, images = randomly(UNetValid(width_multiplier=1 / 32)), image_of(1, 1, 100, 90)
    whole = mirrored(images, (94, 122), (94, 116))  # 16 k + 12 pixels, of which 92 are cut on each side
    with torch.no_grad():
        expected = network.tile_scores(whole)[:, :, 2:102, 2:92].argmax(1)
    assert torch.equal(tiled(network.tile_scores, images, 252, 188).long(), expected)
    assert expected.unique().numel() == 2
    with pytest.raises(ValueError, match="overlap is 183; allowed: 184 or more, since the network returns 68 of 252"):
        tiled(network.tile_scores, images, 252, 183)


def test_tiles_without_overlap_are_independent():
    network, images = randomly(Fine()), image_of(1, 3, 20, 30)
    labels = tiled(network, images, 10, 0)
    for top in (0, 10):
        for left in (0, 10, 20):
            place = (..., slice(top, top + 10), slice(left, left + 10))
            assert torch.equal(labels[place], network.predict(images[place]))
    assert not torch.equal(labels, tiled(network, images, 10, 4))


@pytest.mark.parametrize("network", [Coarse(), Coarse(size_divisor=8)])
def test_tiles_on_the_grid_of_a_coarse_network(network):
    """Inside the image, where zeros beyond its border play no part; steps and cuts are multiples of the stride."""
    network, images = randomly(network), image_of(1, 3, 96, 128)
    labels = tiled(network, images, 48, 16)
    assert torch.equal(labels[:, 16:-16, 16:-16], network.predict(images)[:, 16:-16, 16:-16])
    assert set(network.sizes[:-1]) == {(1, 3, 48, 48)} and len(network.sizes) == 3 * 4 + 1


@pytest.mark.parametrize("network", [FCNResNet, SegNetBasic, SemanticFPN])
def test_a_single_tile_is_the_networks_prediction(network):
    network, images = randomly(network(**NARROW)), image_of(2, 3, 64, 64)
    assert torch.equal(tiled(network, images, 64, 0), network.predict(images))


def test_a_small_image_is_mirrored_again_and_again():
    network, images = randomly(Fine()), image_of(1, 3, 3, 1)
    labels = tiled(network, images, 32, 4)
    assert labels.shape == (1, 3, 1)
    assert torch.equal(labels, tiled(network, images, 5, 4))


def test_one_class_and_other_labels():
    network, images = randomly(Fine(num_classes=1)), image_of(1, 3, 20, 30)
    labels = tiled(network.valid, images, 12, 4, dtype=torch.int64)
    expected = network.valid(mirrored(images, (2, 2), (2, 2)))[:, 0] > 0
    assert labels.dtype == torch.int64 and torch.equal(labels, expected.long())
    assert expected.unique().numel() == 2


def test_tiles_keep_the_memory_format():
    formats = []

    def network(tile):
        formats.append(tile.is_contiguous(memory_format=torch.channels_last))
        return tile

    images = image_of(1, 3, 20, 30)
    channels_last = tiled(network, images.to(memory_format=torch.channels_last), 12, 4)
    assert all(formats) and torch.equal(channels_last, tiled(network, images, 12, 4))
    assert not formats[-1]


def test_bad_arguments_of_tiled_are_named():
    images = torch.zeros(1, 3, 20, 30)
    for arguments, message in (
        ((0, 0), "tile is 0; allowed: 1 or more"),
        (((8, 0), 0), r"tile is \(8, 0\); allowed: 1 or more"),
        ((8, 8), "overlap is 8; allowed: 0 to 7 for this tile"),
        ((8, -1), "overlap is -1; allowed: 0 to 7"),
        ((8.5, 1), "tile is 8.5; allowed: one integer or two"),
        ((8, (1, 2, 3)), r"overlap is \(1, 2, 3\); allowed: one integer or two"),
    ):
        with pytest.raises(ValueError, match=f"fastseg.inference.tiled: {message}"):
            tiled(Coarse(), images, *arguments)
    with pytest.raises(ValueError, match="tiled: dtype is torch.int8; allowed: uint8, int64"):
        tiled(Coarse(), images, 8, 0, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"tiled: images have shape \(3, 20, 30\); allowed: \(N, C, H, W\)"):
        tiled(Coarse(), images[0], 8, 0)
    for found, given in ((lambda tile: {"out": tile}, "dict"), (lambda tile: tile[0, 0], r"a tensor \(8, 8\)")):
        with pytest.raises(ValueError, match=f"tiled: network returns {given}; allowed: labels"):
            tiled(found, images, 8, 0)


# --- sizes and mirror images ---


def plain_average(network, images, scales, flip):
    """The average of the probabilities at full size, of all sizes at once."""
    size, aligned = images.shape[2:], network.align_corners
    found = []
    for scale in scales:
        resized = [round(scale * (n - 1)) + 1 if aligned else round(scale * n) for n in size]
        image = F.interpolate(images, resized, mode="bilinear", align_corners=aligned)
        for flipped in (False, True)[: 1 + flip]:
            scores = network.layers(image.flip(3) if flipped else image)
            scores = F.interpolate(scores, tuple(size), mode="bilinear", align_corners=aligned)
            scores = scores.flip(3) if flipped else scores
            found.append(scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1))
    return sum(found) / len(found)


@pytest.fixture(params=[1 << 20, 1000])
def _strips(request, monkeypatch):
    """The whole image at once, or a few rows."""
    monkeypatch.setattr("fastseg.inference.STRIP_VALUES", request.param)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("aligned, size", [(False, (40, 56)), (False, (37, 50)), (True, (41, 57))])
@pytest.mark.parametrize("classes", [CLASSES, 1])
def test_average_equals_the_plain_formula(aligned, size, flip, classes):
    network, images = randomly(Coarse(classes, aligned)), image_of(2, 3, *size)
    scales = (0.5, 1.0, 1.75)
    labels, probability = multi_scale(network, images, scales, flip, return_probability=True)
    with torch.no_grad():
        stock = plain_average(network, images, scales, flip)
        exact = plain_average(randomly(Coarse(classes, aligned)).double(), images.double(), scales, flip)
    assert_within_policy(probability, stock.amax(1), exact.amax(1), "probability")
    clear = (exact - 0.5).abs()[:, 0] > 1e-5 if classes == 1 else exact.topk(2, dim=1).values.diff(dim=1)[:, 0] < -1e-5
    expected = exact[:, 0] > 0.5 if classes == 1 else exact.argmax(1)
    assert clear.float().mean() > 0.9 and expected.unique().numel() > 1
    assert labels.dtype == torch.uint8 and torch.equal(labels[clear], expected[clear].to(torch.uint8))
    assert torch.equal(labels, multi_scale(network, images, scales, flip))


@pytest.mark.parametrize("network", [FCNResNet, SegNetBasic, SemanticFPN])
def test_scale_1_alone_is_the_networks_prediction(network):
    """Also where the image is padded, and where the network scores every pixel."""
    network, images = randomly(network(**NARROW)), image_of(2, 3, 45, 70)
    labels, probability = multi_scale(network, images, (1.0,), flip=False, return_probability=True)
    with torch.no_grad():
        exact = network.double()(images.double()).softmax(1)
    clear = exact.topk(2, dim=1).values.diff(dim=1)[:, 0] < -1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear].long(), exact.argmax(1)[clear])
    torch.testing.assert_close(probability.double(), exact.amax(1), rtol=1e-4, atol=1e-4)


def test_mirror_image_of_a_padded_image():
    """The padding is at the right of both: the mirror image of the scores begins beyond the image."""
    network, images = randomly(SemanticFPN(**NARROW)), image_of(1, 3, 45, 50)
    _, probability = multi_scale(network, images, (1.0,), return_probability=True)
    with torch.no_grad():
        exact = network.double()
        image = images.double()
        average = (exact(image).softmax(1) + exact(image.flip(3)).flip(3).softmax(1)) / 2
    torch.testing.assert_close(probability.double(), average.amax(1), rtol=1e-4, atol=1e-4)


def positions(covered, resized, size, aligned):
    """Where the pixels of the original image are in the covered part, from -1 to 1 as grid_sample has it."""
    pixels = torch.arange(size, dtype=torch.float64)
    if aligned:
        return 2 * (pixels * (resized - 1) / (size - 1)) / (covered - 1) - 1
    return 2 * ((pixels + 0.5) * resized / size) / covered - 1


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(40, 56), (37, 50)])
def test_average_of_padded_images(aligned, size):
    """Where the grid covers more than the image, the original image has no whole number of pixels on it."""
    network, images = randomly(Coarse(align_corners=aligned, size_divisor=16)), image_of(1, 3, *size)
    scales, averages = (0.7, 1.0, 1.3), []
    _, probability = multi_scale(network, images, scales, return_probability=True)
    for dtype in (torch.float32, torch.float64):
        layers, image, found = network.layers.to(dtype), images.to(dtype), []
        for scale in scales:
            height, width = resized = [round(scale * (n - 1)) + 1 if aligned else round(scale * n) for n in size]
            small = F.interpolate(image, resized, mode="bilinear", align_corners=aligned)
            for flipped in (False, True):
                padded = F.pad(small.flip(3) if flipped else small, (0, -width % 16, 0, -height % 16))
                rows, columns = (positions(*n, aligned) for n in zip(padded.shape[2:], resized, size))
                grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None].to(dtype)
                with torch.no_grad():
                    scores = F.grid_sample(layers(padded), grid, padding_mode="border", align_corners=aligned)
                found.append((scores.flip(3) if flipped else scores).softmax(1))
        averages.append((sum(found) / len(found)).amax(1))
    assert_within_policy(probability, *averages, "probability")


def test_labels_of_mirrored_images_are_mirrored():
    network, images = randomly(Coarse()), image_of(1, 3, 40, 56)
    _, own = multi_scale(network, images, (0.75, 1.25), return_probability=True)
    _, mirror = multi_scale(network, images.flip(3), (0.75, 1.25), return_probability=True)
    torch.testing.assert_close(mirror.flip(2), own)
    _, alone = multi_scale(network, images, (0.75, 1.25), flip=False, return_probability=True)
    assert not torch.allclose(alone, own)


def test_half_precision_is_averaged_in_single():
    network, images = randomly(Coarse()).bfloat16(), image_of(1, 3, 40, 56).bfloat16()
    labels, probability = multi_scale(network, images, (1.0,), flip=False, return_probability=True, dtype=torch.int64)
    assert (labels.dtype, probability.dtype) == (torch.int64, torch.float32)
    with torch.no_grad():
        scores = F.interpolate(network.layers(images).double(), (40, 56), mode="bilinear")
    torch.testing.assert_close(probability.double(), scores.softmax(1).amax(1), atol=1e-6, rtol=1e-6)


def test_sizes_of_the_network_are_kept():
    """8 k + 1 pixels for a network that aligns corners, and at least the smallest image."""
    network = randomly(Coarse(align_corners=True))
    multi_scale(network, torch.zeros(1, 3, 33, 65), (0.5, 1.0, 2.0))
    assert network.sizes == [(2, 3, 17, 33), (2, 3, 33, 65), (2, 3, 65, 129)]
    network = randomly(Coarse())
    network.smallest_image = 12
    multi_scale(network, torch.zeros(1, 3, 16, 32), (0.5, 0.01), flip=False)
    assert network.sizes == [(1, 3, 12, 16), (1, 3, 12, 12)]


def test_scores_at_full_size_are_never_made():
    """Tensors that live at the same time, apart from the network's: no (C, H, W)."""
    network, largest = Coarse(num_classes=40), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(value.numel() for value in [result] if isinstance(value, torch.Tensor))
            return result

    images = torch.zeros(1, 3, 256, 256)
    for run in (
        lambda: multi_scale(network, images, (1.0,)),
        lambda: tiled(lambda tile: multi_scale(network, tile, (1.0,)), images, 64, 16),
    ):
        largest.clear()
        with pytest.MonkeyPatch.context() as patch, Sizes():
            patch.setattr("fastseg.inference.STRIP_VALUES", 40 * 256 * 8)
            run()
        assert max(largest) < 40 * 256 * 256 / 4


def test_tiles_of_averages():
    network, images = randomly(Fine()), image_of(1, 3, 40, 50)
    labels = tiled(lambda tile: multi_scale(network, tile, (1.0,), flip=False), images, 24, 8)
    assert torch.equal(labels, tiled(network, images, 24, 8))


def test_bad_arguments_of_multi_scale_are_named():
    images = torch.zeros(1, 3, 20, 30)
    for scales in ((), (1.0, 0.0), (-1.0,), (float("nan"),), (float("inf"),)):
        with pytest.raises(ValueError, match=r"multi_scale: scales are \(.*\); allowed: numbers above 0"):
            multi_scale(Coarse(), images, scales)
    with pytest.raises(ValueError, match="multi_scale: dtype is torch.float32; allowed: uint8, int64"):
        multi_scale(Coarse(), images, dtype=torch.float32)
    with pytest.raises(ValueError, match="multi_scale: dtype is uint8 for 300 classes; allowed: int64"):
        multi_scale(Coarse(num_classes=300), images, (1.0,))
    with pytest.raises(RuntimeError, match=r"multi_scale: images have shape \(1, 3, 0, 30\)"):
        multi_scale(Coarse(), images[:, :, :0])
    with pytest.raises(ValueError, match="multi_scale: network returns dict; allowed: scores"):
        multi_scale(lambda image: {"out": image}, images)


@pytest.mark.parametrize("bar", ["tqdm", "lines"])
def test_progress_is_shown_if_asked_for(bar, monkeypatch, capsys):
    if bar == "lines":
        monkeypatch.setattr(progress_bar, "tqdm", None)
    elif progress_bar.tqdm is None:
        pytest.skip("needs tqdm")
    network, images = randomly(Coarse()), image_of(1, 3, 20, 30)
    tiled(network, images, 8, 0)
    multi_scale(network, images)
    assert capsys.readouterr().err == ""  # stderr is no terminal
    tiled(network, images, 8, 0, progress=True)
    assert "tiles" in capsys.readouterr().err
    multi_scale(network, images, progress=True)
    assert "sizes of images" in capsys.readouterr().err
    monkeypatch.setattr("fastseg.inference.STRIP_VALUES", 1)
    multi_scale(network, images, (1.0,), progress=True)
    assert "strips of the average" in capsys.readouterr().err
