"""paste_masks of Mask R-CNN's 28 x 28 masks, and upsample_masks of masks a quarter of the image's size, to packed bits.
The shape of a case is (N, H, W), the size of the image.
"""

import torch
import torch.nn.functional as F

import fastseg.ops
from benchmarks.harness import Case, Inputs, Peer, Target
from fastseg.testing import assert_within_policy

CELLS = 28
LOW = 256  # rows and columns of Segment Anything's logits, for a square with 4 times as many rows and columns
PADDED = (4 * LOW, 4 * LOW)


def smooth_noise(count, size):
    return F.interpolate(torch.randn(count, 1, size // 7, size // 7), size=(size, size), mode="bicubic")[:, 0]


def make(shape, device, dtype, layout):
    """Masks, and boxes of 5 to 50 percent of the image's extent, some of them partly outside."""
    count, height, width = shape
    extent = torch.tensor([width, height], dtype=torch.float32)
    centre, side = torch.rand(count, 2) * extent, (0.05 + 0.45 * torch.rand(count, 2)) * extent
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    return (smooth_noise(count, CELLS) * 4).sigmoid().to(device, dtype), boxes.to(device), height, width


def make_logits(shape, device, dtype, layout):
    return (smooth_noise(shape[0], LOW) * 4).to(device, dtype), shape[1], shape[2]


def input_size(height, width):
    """The size of the image, resized so that its longer side fits the padded square."""
    scale = PADDED[0] / max(height, width)
    return round(height * scale), round(width * scale)


def words(shape):
    return shape[0] * shape[1] * ((shape[2] + 31) // 32)


def minimal_bytes(shape, dtype):
    """Masks and boxes read once, the bits written once."""
    return shape[0] * (CELLS * CELLS * dtype.itemsize + 16) + 4 * words(shape)


def minimal_bytes_of_values(shape, dtype):
    """Masks and boxes read once, one value per pixel written."""
    return shape[0] * (CELLS * CELLS * dtype.itemsize + 16) + dtype.itemsize * torch.Size(shape).numel()


def minimal_bytes_of_logits(shape, dtype):
    return shape[0] * LOW * LOW * dtype.itemsize + 4 * words(shape)


def ours(masks, boxes, height, width):
    return fastseg.ops.paste_masks(masks, boxes, (height, width)).words


def ours_upsampled(logits, height, width):
    size = input_size(height, width)
    return fastseg.ops.upsample_masks(logits, (height, width), padded_size=PADDED, input_size=size).words


def grid_sample(masks, boxes, height, width):
    """As in detectron2: every pixel of the image samples every mask."""
    left, top, right, bottom = boxes.split(1, 1)
    y = (torch.arange(height, device=masks.device) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(width, device=masks.device) + 0.5 - left) / (right - left) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
    return F.grid_sample(masks[:, None], grid.to(masks.dtype), align_corners=False)[:, 0] >= 0.5


def grid_sample_of_boxes(masks, boxes, height, width):
    """As in detectron2 on the CPU: mask by mask, in the part of the image that its box covers."""
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    for place, (left, top, right, bottom) in enumerate(boxes.tolist()):
        x0, y0 = max(int(left) - 1, 0), max(int(top) - 1, 0)
        x1, y1 = min(int(right) + 2, width), min(int(bottom) + 2, height)
        if x0 < x1 and y0 < y1:
            shift = boxes.new_tensor([x0, y0, x0, y0])
            part = grid_sample(masks[place : place + 1], boxes[place : place + 1] - shift, y1 - y0, x1 - x0)
            result[place, y0:y1, x0:x1] = part[0]
    return result


def ours_soft(masks, boxes, height, width):
    """The call of fastseg.integrations.torchvision."""
    return fastseg.ops.paste_masks(masks, boxes, (height, width), convention="torchvision", output="soft")


def interpolate_boxes(masks, boxes, height, width):
    """torchvision's paste_masks_in_image: each mask, with its border, at the size of its box in integer pixels."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((CELLS + 2) / CELLS)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    images = []
    for mask, box in zip(F.pad(masks, (1, 1, 1, 1)), torch.cat([centre - half, centre + half], 1).long()):
        left, top, right, bottom = box.tolist()
        size = bottom - top + 1, right - left + 1
        values = F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        images.append(masks.new_zeros(height, width))
        x0, x1, y0, y1 = max(left, 0), min(right + 1, width), max(top, 0), min(bottom + 1, height)
        images[-1][y0:y1, x0:x1] = values[y0 - top : y1 - top, x0 - left : x1 - left]
    return torch.stack(images)


def interpolate(logits, height, width):
    """Segment Anything's two steps."""
    rows, columns = input_size(height, width)
    padded = F.interpolate(logits[:, None], PADDED, mode="bilinear", align_corners=False)
    return F.interpolate(padded[..., :rows, :columns], (height, width), mode="bilinear", align_corners=False)[:, 0] > 0


def verify(case: Case, inputs: Inputs) -> str | None:
    """Equal to the first peer, except for pixels whose value equals the threshold up to rounding."""
    expected = next(iter(case.peers.values())).run(*inputs)
    bits = fastseg.ops.unpack_masks(fastseg.ops.PackedMasks(case.ours(*inputs), inputs[-1]))
    wrong = (bits != expected).sum().item()
    return f"{wrong} of {bits.numel()} pixels differ" if wrong > 2 + 1e-5 * bits.numel() else None


def case(shape, dtype=torch.float32, targets=()):
    peers = {"grid_sample": Peer(grid_sample), "grid_sample of boxes": Peer(grid_sample_of_boxes, devices=("cpu",))}
    return Case("paste_masks", shape, make, ours, peers, minimal_bytes, verify, dtype=dtype, targets=targets,
                backward=False, quick_shape=(5, 40, 60))  # fmt: skip


def case_of_logits(shape):
    return Case("upsample_masks", shape, make_logits, ours_upsampled, {"interpolate twice": Peer(interpolate)},
                minimal_bytes_of_logits, verify, backward=False, quick_shape=(2, 60, 80))  # fmt: skip


def verify_soft(case: Case, inputs: Inputs) -> str | None:
    masks, *boxes_and_size = inputs
    values = interpolate_boxes(masks, *boxes_and_size)
    exact = interpolate_boxes(masks.double(), *boxes_and_size)
    try:
        assert_within_policy(case.ours(*inputs), values, exact)
    except AssertionError as error:
        return str(error)
    return None


def case_of_values(shape):
    return Case("paste_masks", shape, make, ours_soft, {"interpolate boxes": Peer(interpolate_boxes)},
                minimal_bytes_of_values, verify_soft, name="soft", backward=False, quick_shape=(5, 40, 60))  # fmt: skip


IMAGE = (100, 800, 1333)
CASES = [
    case(
        IMAGE,
        targets=(
            Target("speedup", 10, "grid_sample"),
            Target("extra_memory", 2 * 4 * words(IMAGE), allocator="default"),
            Target("speedup", 5, "grid_sample", allocator="default", device="cuda"),
            Target("memory_ratio", 20, "grid_sample", device="cuda", allocator="default"),
        ),
    ),
    case((100, 480, 640)),
    case((1000, 480, 640)),
    case_of_values(IMAGE),
    case_of_logits((32, 800, 1200)),
]
