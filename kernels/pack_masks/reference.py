"""Packing and unpacking of masks in plain PyTorch: the definition of the ops."""

import torch
from torch import Tensor
from torch.nn.functional import pad

WORD = 32  # pixels in a word: bit b of word w of a row is pixel 32 w + b


def words_in_row(width: int) -> int:
    return (width + WORD - 1) // WORD


def pack_masks(masks: Tensor, threshold: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """masks: [N, H, W]. Gives the words, int32 [N, H, ceil(W / 32)], areas and tight boxes (`mask_statistics`)."""
    from fastseg.kernels.masks_to_boxes.reference import mask_statistics

    pixels = masks != 0 if threshold is None else masks > threshold
    images, height, width = pixels.shape
    count = words_in_row(width)
    bits = pad(pixels, (0, count * WORD - width)).reshape(images, height, count, WORD).long()
    words = (bits << torch.arange(WORD, device=masks.device)).sum(3)
    words = torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).to(torch.int32)
    return words, *mask_statistics(words)


def unpack_masks(words: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """words: int32 [N, H, ceil(width / 32)]. Gives [N, H, width] of zeros and ones."""
    bits = (words.unsqueeze(3) >> torch.arange(WORD, device=words.device, dtype=torch.int32)) & 1
    return bits.reshape(words.shape[0], words.shape[1], words.shape[2] * WORD)[..., :width].to(dtype)
