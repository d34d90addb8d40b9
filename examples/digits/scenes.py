"""Labelled scenes from real images: handwritten digits pasted on photographs, nothing downloaded.

scikit-learn contains the digits and two photographs, scikit-image the other photographs. Training and test
scenes have no digit and no part of a photograph in common: the test scenes use the last 397 digits and the
right third of every photograph.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from skimage import data
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ("background", *"0123456789")
SIDE = 128  # pixels of a scene
IGNORE = 255  # label of the soft edge of a digit, which is neither digit nor background
CELL = 64  # pixels; every cell of the scene may hold one digit
TRAINING_DIGITS = 1400
TRAINING_COLUMNS = 2 / 3
MEAN, DEVIATION = 0.45, 0.25  # of the images, roughly


def photographs(training):
    """The left two thirds (``training``) or the right third of each photograph: uint8 ``(3, H, W)``."""
    china, flower = load_sample_images().images
    motorcycle = data.stereo_motorcycle()[0]
    images = [
        data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), data.hubble_deep_field(),
        data.retina()[::3, ::3], china, flower, motorcycle,
    ]  # fmt: skip
    parts = []
    for image in images:
        cut = round(image.shape[1] * TRAINING_COLUMNS)
        part = image[:, :cut] if training else image[:, cut:]
        parts.append(torch.from_numpy(part.copy()).permute(2, 0, 1))
    return parts


def handwritten_digits(training):
    """Grey 8x8 digits with a margin of one pixel, float ``(N, 1, 10, 10)`` in [0, 1], and their labels."""
    digits = load_digits()
    chosen = slice(None, TRAINING_DIGITS) if training else slice(TRAINING_DIGITS, None)
    glyphs = torch.from_numpy(digits.images[chosen]).float()[:, None] / 16
    return F.pad(glyphs, (1, 1, 1, 1)), digits.target[chosen]


class Scenes:
    """Makes scenes, always the same for the same ``seed``."""

    def __init__(self, training, seed):
        self.training = training
        self.photographs = photographs(training)
        self.glyphs, self.meanings = handwritten_digits(training)
        self.random = np.random.default_rng(seed)

    def make(self, count, height, width, progress=iter):
        """``count`` scenes: uint8 images (count, 3, height, width) and labels (count, height, width)."""
        images = torch.empty(count, 3, height, width, dtype=torch.uint8)
        labels = torch.empty(count, height, width, dtype=torch.uint8)
        for index in progress(range(count)):
            image, labels[index] = self._scene(height, width)
            images[index] = (image * 255).round().to(torch.uint8)
        return images, labels

    def _scene(self, height, width):
        image = self._background(height, width)
        label = torch.zeros(height, width, dtype=torch.uint8)
        for top in range(0, height, CELL):
            for left in range(0, width, CELL):
                if self.random.random() < 0.85:
                    centre = [corner + CELL * self.random.uniform(0.4, 0.6) for corner in (top, left)]
                    self._paste_digit(image, label, *centre)
        return image, label

    def _background(self, height, width):
        """A random crop of a photograph, at full or down to half its resolution."""
        photograph = self.photographs[self.random.integers(len(self.photographs))]
        rows, columns = photograph.shape[1:]
        zoom = min(self.random.uniform(1, 2), rows / height, columns / width)
        crop_rows, crop_columns = int(height * zoom), int(width * zoom)
        top = self.random.integers(rows - crop_rows + 1)
        left = self.random.integers(columns - crop_columns + 1)
        crop = photograph[None, :, top : top + crop_rows, left : left + crop_columns] / 255
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
        if self.random.random() < 0.5:
            crop = crop.flip(2)
        if self.training:  # light unlike that of the test scenes: a gamma per colour
            crop = crop ** torch.from_numpy(2 ** self.random.uniform(-0.7, 0.7, (3, 1, 1))).float()
        return crop.clamp(0, 1)

    def _paste_digit(self, image, label, row, column):
        """Paints one digit around (row, column), in place, and sets its labels."""
        pick, where, opacity = self._place_digit(image.shape[1:], row, column)
        self._paint(image[:, *where], opacity)
        label[where][opacity > 0.1] = IGNORE
        label[where][opacity > 0.7] = int(self.meanings[pick]) + 1

    def _place_digit(self, size, row, column):
        """A digit around (row, column) of a scene: its number, the slices that it covers, and its opacity there."""
        pick = self.random.integers(len(self.glyphs))
        opacity = self._opacity(self.glyphs[pick : pick + 1])
        half = opacity.shape[0] // 2
        rows, columns = size
        top, left = round(row) - half, round(column) - half
        inside = slice(max(0, -top), rows - top), slice(max(0, -left), columns - left)
        where = slice(max(0, top), top + 2 * half), slice(max(0, left), left + 2 * half)
        return pick, where, opacity[inside]

    def _paint(self, region, opacity):
        """Paints with a random colour that stands out."""
        brightness = (region.mean(0) * opacity).sum() / opacity.sum()
        colour = torch.from_numpy(self.random.uniform(0, 0.55, (3, 1, 1))).float()
        colour = colour if brightness > 0.5 else 1 - colour
        strength = opacity * self.random.uniform(0.85, 1)
        region.copy_(region + (colour - region) * strength)

    def _opacity(self, glyph):
        """The glyph smoothly enlarged, its size, angle, proportions and stroke chosen at random.

        Returns ``(side, side)`` opacities in [0, 1]; side is even.
        """
        half = CELL / 2 * self.random.uniform(0.75, 1.25)
        side = 2 * math.ceil(half)
        angle = self.random.uniform(-0.4, 0.4)
        cosine, sine = math.cos(angle) * side / 2 / half, math.sin(angle) * side / 2 / half
        narrower = self.random.uniform(0.9, 1.15)
        to_glyph = torch.tensor([[[narrower * cosine, narrower * sine, 0], [-sine, cosine, 0]]])
        grid = F.affine_grid(to_glyph, (1, 1, side, side), align_corners=False)
        enlarged = F.grid_sample(glyph, grid, mode="bicubic", align_corners=False)[0, 0]
        return ((enlarged - self.random.uniform(0.2, 0.4)) / 0.25).clamp(0, 1)


def normalised(images):
    """uint8 ``(N, 3, H, W)`` -> float in channels_last, mean near 0 and deviation near 1."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(MEAN).div_(DEVIATION)
