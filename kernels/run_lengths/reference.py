"""Run lengths of packed masks, and their text as COCO writes it, in plain PyTorch and Python: the definition.

A mask is read column by column (pixel x H + y). Its counts are the lengths of runs of equal pixels, zeros first.
"""

import torch
from torch import Tensor

from fastseg.kernels.pack_masks.reference import pack_masks, unpack_masks

# Codes for what is wrong with a text, in place of its number of counts.
BAD_CHARACTER, TRUNCATED, OUT_OF_RANGE = -1, -2, -3
MOST_CHARACTERS = 7  # of a count: 5 bits each, of a difference of two numbers below 2^31
_FIRST_CHARACTER, _MORE, _SIGN = 48, 32, 16


def count_runs(words: Tensor, width: int) -> Tensor:
    """words: int32 [N, H, ceil(width / 32)]. Gives the number of counts of each mask, int64 [N]."""
    return torch.tensor([len(counts) for counts in _counts(words, width)], dtype=torch.int64, device=words.device)


def run_lengths(words: Tensor, width: int) -> Tensor:
    """The counts of all masks, one mask after the other, int64."""
    counts = [count for counts in _counts(words, width) for count in counts]
    return torch.tensor(counts, dtype=torch.int64, device=words.device)


def _counts(words: Tensor, width: int) -> list[list[int]]:
    found = []
    for mask in unpack_masks(words, width, torch.uint8):
        counts, run, value = [], 0, 0
        for pixel in mask.T.flatten().tolist():
            if pixel != value:
                counts.append(run)
                run, value = 0, pixel
            run += 1
        found.append([*counts, run])
    return found


def masks_of_runs(counts: Tensor, begins: Tensor, ends: Tensor, height: int, width: int) -> Tensor:
    """Mask n has counts[begins[n]:ends[n]], int64, which add up to height x width. Gives the words, int32
    [N, H, ceil(width / 32)].
    """
    masks = []
    for begin, end in zip(begins.tolist(), ends.tolist()):
        lengths = counts[begin:end]
        pixels = torch.repeat_interleave(torch.arange(len(lengths)) % 2, lengths)
        masks.append(pixels.reshape(width, height).T)
    pixels = torch.stack(masks) if masks else torch.zeros(0, height, width)
    return pack_masks(pixels.bool(), None)[0]


def run_statistics(counts: Tensor, begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the sum of counts[begins[n]:ends[n]], the pixels of mask n, and its area: int64 [N]."""
    lists = [counts[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())]
    sums = [[int(one.sum()), int(one[1::2].sum())] for one in lists]
    pixels, area = torch.tensor(sums, dtype=torch.int64).view(-1, 2).unbind(1)
    return pixels.clone(), area.clone()


def run_overlaps(counts: Tensor, begins: Tensor, ends: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The pixels that masks first[p] and second[p] share, int64 [pairs]; a shorter mask is padded with 0."""

    def pixels(mask):
        lengths = counts[begins[mask] : ends[mask]]
        return torch.repeat_interleave(torch.arange(len(lengths)) % 2, lengths)

    shared = []
    for one, other in zip(first.tolist(), second.tolist()):
        a, b = pixels(one), pixels(other)
        most = min(len(a), len(b))
        shared.append(int((a[:most] & b[:most]).sum()))
    return torch.tensor(shared, dtype=torch.int64)


def write_counts(counts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gives the texts, uint8 [7 counts], and their lengths; a text begins at 7 times the place of the mask's counts."""
    text = torch.zeros(MOST_CHARACTERS * len(counts), dtype=torch.uint8)
    lengths, begin = [], 0
    for end in ends.tolist():
        characters = []
        run = counts[begin:end].tolist()
        for i, value in enumerate(run):
            value -= run[i - 2] if i > 2 else 0
            more = True
            while more:
                low, value = value & 31, value >> 5
                more = value != (-1 if low & _SIGN else 0)
                characters.append(low + _FIRST_CHARACTER + (_MORE if more else 0))
        text[MOST_CHARACTERS * begin :][: len(characters)] = torch.tensor(characters, dtype=torch.uint8)
        lengths.append(len(characters))
        begin = end
    return text, torch.tensor(lengths, dtype=torch.int64)


def read_counts(text: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """text: uint8, of all masks; ends: int64 [N]. Gives the counts, int64 [characters], where the counts of a mask
    begin at the place of its text, and their number, or what is wrong with the text.
    """
    counts = torch.zeros(len(text), dtype=torch.int64)
    numbers, begin = [], 0
    for end in ends.tolist():
        found = _read(text[begin:end].tolist())
        numbers.append(found if isinstance(found, int) else len(found))
        if not isinstance(found, int):
            counts[begin:][: len(found)] = torch.tensor(found, dtype=torch.int64)
        begin = end
    return counts, torch.tensor(numbers, dtype=torch.int64)


def _read(text: list[int]) -> list[int] | int:
    counts, value, shift = [], 0, 0
    for character in text:
        bits = character - _FIRST_CHARACTER
        if not 0 <= bits < 64:
            return BAD_CHARACTER
        value |= (bits & 31) << shift
        shift += 5
        if bits & _MORE:
            if shift == 5 * MOST_CHARACTERS:
                return OUT_OF_RANGE
            continue
        if bits & _SIGN:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        if not 0 <= value < 1 << 31:
            return OUT_OF_RANGE
        counts.append(value)
        value = shift = 0
    return TRUNCATED if shift else counts
