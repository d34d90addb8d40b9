"""The picture of the result: image, truth and prediction of some test scenes, with a legend."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.digits.scenes import CLASSES, IGNORE

ZOOM = 2
MARGIN = 12
LABEL_COLUMN = 120
TITLE_ROW, LEGEND_ROW = 56, 64
BACKDROP, INK, IGNORED = (250, 250, 250), (30, 30, 30), (255, 255, 255)

# background, then one colour for each digit
PALETTE = (
    (24, 26, 32), (230, 75, 70), (240, 150, 50), (245, 215, 75), (150, 205, 70), (50, 160, 90),
    (70, 200, 200), (65, 130, 230), (135, 95, 220), (225, 110, 200), (165, 110, 75),
)  # fmt: skip


def colourise(labels):
    """uint8 ``(H, W)`` class labels -> ``(H, W, 3)`` colours."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(PALETTE)] = PALETTE
    table[IGNORE] = IGNORED
    return table[labels.numpy()]


def draw(path, images, labels, predictions, title):
    """Writes the PNG: one column per scene, with rows image, truth and prediction."""
    rows = {
        "image": [enlarged(image.permute(1, 2, 0).numpy(), Image.Resampling.BICUBIC) for image in images],
        "truth": [enlarged(colourise(label), Image.Resampling.NEAREST) for label in labels],
        "prediction": [enlarged(colourise(prediction), Image.Resampling.NEAREST) for prediction in predictions],
    }
    write_sheet(path, rows, title, [*zip(CLASSES, PALETTE), ("not counted (soft rim)", IGNORED)])


def enlarged(pixels, method):
    """uint8 ``(H, W, 3)`` -> an image of ``ZOOM`` times the size."""
    height, width = pixels.shape[:2]
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((width * ZOOM, height * ZOOM), method)


def write_sheet(path, rows, title, legend):
    """Writes the PNG: a title, named rows of images of one size, a legend of (name, colour)."""
    tiles = next(iter(rows.values()))
    cell_width, cell_height = (extent + MARGIN for extent in tiles[0].size)
    size = (LABEL_COLUMN + len(tiles) * cell_width + MARGIN, TITLE_ROW + len(rows) * cell_height + LEGEND_ROW)
    sheet = Image.new("RGB", size, BACKDROP)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(24))
    for row, (name, tiles) in enumerate(rows.items()):
        top = TITLE_ROW + row * cell_height
        pen.text((MARGIN, top + cell_height // 2), name, INK, ImageFont.load_default(20), anchor="lm")
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (LABEL_COLUMN + column * cell_width, top))
    _draw_legend(pen, TITLE_ROW + len(rows) * cell_height, legend)
    sheet.save(path)


def _draw_legend(pen, top, entries):
    font = ImageFont.load_default(20)
    left = LABEL_COLUMN
    for name, colour in entries:
        pen.rectangle((left, top + 14, left + 28, top + 42), fill=colour, outline=INK)
        pen.text((left + 38, top + 28), name, INK, font, anchor="lm")
        left += 38 + round(font.getlength(name)) + 28
