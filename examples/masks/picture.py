"""The picture: scenes, all their proposals, and those that mask NMS keeps."""

import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from examples.digits.picture import PALETTE, ZOOM, enlarged, write_sheet

SMOOTHING = 2  # drawn this much larger, then averaged
LOWEST_SCORE = 0.5  # that is drawn
DIMMED = 0.6  # brightness of the photograph below the masks
FILL = 0.6  # opacity
LINE = 1  # pixels of the picture
LIGHTER = 0.4  # lightness of the outline above that of the filling, 0 to 1


def draw(path, shown, title):
    """Writes the PNG, a column for each (scene, proposals, scores, kept) of ``shown``."""
    rows = {"image": [], "before\nNMS": [], "after\nmask NMS": []}
    for scene, proposals, scores, kept in shown:
        photograph = enlarged(scene.image.permute(1, 2, 0).numpy(), Image.Resampling.BICUBIC)
        orders = scores.argsort(), kept.flip(0)
        tiles = photograph, *(overlay(scene, proposals, order[scores[order] >= LOWEST_SCORE]) for order in orders)
        for row, tile in zip(rows.values(), tiles):
            row.append(tile)
    write_sheet(path, rows, title, [*zip("0123456789", PALETTE[1:])])


def overlay(scene, proposals, order):
    """The proposals in ``order``, the last on top, filled and outlined in the colours of their digits."""
    scale = ZOOM * SMOOTHING
    height, width = (scale * extent for extent in scene.image.shape[1:])
    canvas = F.interpolate(scene.image[None] / 255, (height, width), mode="bicubic")[0].clamp(0, 1)
    canvas = DIMMED * canvas.lerp(canvas.mean(0, keepdim=True), 0.5)  # with half of its colour
    masks = fastseg.ops.paste_masks(proposals.masks[order], proposals.boxes[order] * scale, (height, width))
    for mask, box, label in zip(masks, masks.boxes.tolist(), proposals.labels[order].tolist()):
        left, top, right, bottom = box
        if left == right:
            continue  # empty mask
        pixels = fastseg.ops.unpack_masks(mask.crop(*box))[0]
        colour = torch.tensor(PALETTE[1 + label])[:, None, None] / 255
        part = canvas[:, top:bottom, left:right]
        part.copy_(torch.where(pixels, part.lerp(colour, FILL), part))
        part.copy_(torch.where(outline(pixels, LINE * SMOOTHING), colour.lerp(torch.ones(()), LIGHTER), part))
    canvas = F.avg_pool2d(canvas, SMOOTHING).permute(1, 2, 0)
    return Image.fromarray((canvas * 255).round().to(torch.uint8).numpy())


def outline(mask, thickness):
    """The pixels of a mask near its edge; all are inside the mask."""
    outside = F.pad((~mask)[None].float(), 4 * (thickness,), value=1)
    return mask & (F.max_pool2d(outside, 2 * thickness + 1, stride=1)[0] > 0)
