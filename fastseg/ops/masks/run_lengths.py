"""masks_to_rle and rle_to_masks: COCO's run-length encoding of masks, to and from packed bits.

A mask is read column by column. Its counts are the lengths of runs of equal pixels, zeros first (so the first may be
0). In compressed form they are text: each count (from the fourth on its difference from the one before last) in groups
of 5 bits, the lowest first, a character each: 48 + bits, + 32 if more follow.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.run_lengths import reference
from fastseg.ops.masks.pack_masks import packed_from
from fastseg.ops.masks.packed import PackedMasks, words_in_row

MOST_PIXELS = 2**31 - 1  # of a mask: counts are 32-bit numbers
_LIST = (torch.int64,)


def check_words(words, boxes, width):
    _check.argument("masks_to_rle", "words", words, (torch.int32,), ("N", "H", words_in_row(width)))
    _check.argument("masks_to_rle", "boxes", boxes, (torch.int32,), (words.shape[0], 4), like=("words", words))


def check_lists(counts, ends):
    _check.argument("run_lengths", "counts", counts, (torch.int64, torch.uint8), ("K",))
    _check.argument("run_lengths", "ends", ends, _LIST, ("N",), like=("counts", counts))


count_runs_op = Op(
    "count_runs(Tensor words, Tensor boxes, SymInt width) -> Tensor runs",
    check=check_words,
    outputs=lambda words: words.new_empty(words.shape[0], dtype=torch.int64),
    internal=True,
    contiguous=("words", "boxes"),
    backends=rows(reference.count_runs, cpu=(torch.int32,), cuda=(torch.int32,)),
)

run_lengths_op = Op(
    "run_lengths(Tensor words, Tensor boxes, SymInt width, Tensor ends, SymInt total) -> Tensor counts",
    check=check_words,
    outputs=lambda words, total: words.new_empty(total, dtype=torch.int64),
    internal=True,
    contiguous=("words", "boxes", "ends"),
    backends=rows(reference.run_lengths, cpu=(torch.int32,), cuda=(torch.int32,)),
)

write_counts_op = Op(
    "write_counts(Tensor counts, Tensor ends) -> (Tensor text, Tensor lengths)",
    check=check_lists,
    outputs=lambda counts, ends: (
        counts.new_empty(reference.MOST_CHARACTERS * counts.shape[0], dtype=torch.uint8),
        torch.empty_like(ends),
    ),
    internal=True,
    contiguous=("counts", "ends"),
    backends=rows(reference.write_counts, cpu=_LIST),
)

read_counts_op = Op(
    "read_counts(Tensor text, Tensor ends) -> (Tensor counts, Tensor numbers)",
    check=lambda text, ends: check_lists(text, ends),
    outputs=lambda text, ends: (torch.empty_like(text, dtype=torch.int64), torch.empty_like(ends)),
    internal=True,
    contiguous=("text", "ends"),
    backends=rows(reference.read_counts, cpu=(torch.uint8,)),
)

masks_of_runs_op = Op(
    "masks_of_runs(Tensor counts, Tensor begins, Tensor ends, SymInt height, SymInt width) -> Tensor words",
    check=check_lists,
    outputs=lambda counts, ends, height, width: counts.new_empty(
        (ends.shape[0], height, words_in_row(width)), dtype=torch.int32
    ),
    internal=True,
    contiguous=("counts", "begins", "ends"),
    backends=rows(reference.masks_of_runs, cpu=_LIST),
)


run_statistics_op = Op(
    "run_statistics(Tensor counts, Tensor begins, Tensor ends) -> (Tensor pixels, Tensor area)",
    check=check_lists,
    outputs=lambda ends: (torch.empty_like(ends), torch.empty_like(ends)),
    internal=True,
    contiguous=("counts", "begins", "ends"),
    backends=rows(reference.run_statistics, cpu=_LIST),
)

run_overlaps_op = Op(
    "run_overlaps(Tensor counts, Tensor begins, Tensor ends, Tensor first, Tensor second) -> Tensor shared",
    check=check_lists,
    outputs=lambda first: torch.empty_like(first),
    internal=True,
    contiguous=("counts", "begins", "ends", "first", "second"),
    backends=rows(reference.run_overlaps, cpu=_LIST),
)


def masks_to_rle(masks: PackedMasks | Tensor, compressed: bool = True, *, backend: str = "auto") -> list[dict]:
    """The masks in COCO's run-length encoding: `pycocotools.mask.encode`, from packed bits.

    Args:
        masks: N masks: `PackedMasks`, or (N, H, W) of bool or uint8, which is packed first. At most 2^31 - 1 pixels
            each. On a GPU the runs are found there, and only they are copied to the host.
        compressed: True: the counts as text. False: as a list.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        N dictionaries {"size": [H, W], "counts": bytes, or a list of int}.

    Raises:
        RuntimeError: another dtype or shape.
        ValueError: masks of more pixels.
        TypeError: arguments of other types.
    """
    name = "masks_to_rle"
    masks = packed_from(name, "masks", masks)
    _check.booleans(name, compressed=compressed)
    _, height, width = masks.shape
    _check_pixels(name, height, width)
    counts, ends = counts_of_masks(masks, backend)
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    if not compressed:
        values = counts.tolist()
        texts = [values[start:stop] for start, stop in zip(starts, stops)]
    else:
        on_host = "reference" if backend == "reference" else "auto"
        text, lengths = write_counts_op(counts, ends, backend=on_host)
        characters, most = text.numpy().tobytes(), reference.MOST_CHARACTERS
        texts = [characters[most * start : most * start + length] for start, length in zip(starts, lengths.tolist())]
    return [{"size": [height, width], "counts": text} for text in texts]


def rle_to_masks(
    rles: Sequence[Mapping] | Mapping,
    size: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> PackedMasks:
    """Packed masks from COCO's run-length encoding: `pycocotools.mask.decode`, to packed bits.

    Args:
        rles: dictionaries {"size": [H, W], "counts": ...}, or one. Counts are text (bytes or str, compressed) or a
            sequence of ints. All masks have one size.
        size: (H, W) that they must have; required if `rles` is empty.
        device: of the result; decoding runs on the host.
        backend: "auto", "cpu" or "reference".

    Returns:
        `PackedMasks`, one for each dictionary.

    Raises:
        ValueError: sizes that differ; counts that are negative, too large, cut off, of other characters, or do not add
            up to H W.
        TypeError: arguments of other types.
    """
    name = "rle_to_masks"
    rles = [rles] if isinstance(rles, Mapping) else rles
    if isinstance(rles, (str, bytes)) or not isinstance(rles, Sequence):
        raise TypeError(f"fastseg.ops.{name}: rles is {type(rles).__name__}; allowed: a list of dictionaries, or one")
    size = None if size is None else _size(name, "size", size)
    for i, rle in enumerate(rles):
        if not isinstance(rle, Mapping) or not {"size", "counts"} <= set(rle):
            raise TypeError(f'fastseg.ops.{name}: rles[{i}]={rle!r:.80}; allowed: {{"size": [H, W], "counts": ...}}')
        found = _size(name, f"rles[{i}]['size']", rle["size"])
        size = size or found
        if found != size:
            raise ValueError(f"fastseg.ops.{name}: rles[{i}]['size']={list(found)}; allowed: {list(size)}, as before")
    if size is None:
        raise ValueError(f"fastseg.ops.{name}: size=None; allowed without any rles: (H, W)")
    _check_pixels(name, *size)
    given = [rle["counts"] for rle in rles]
    counts, begins, ends, area = read_rles(
        given, [size] * len(rles), lambda i: f"fastseg.ops.{name}: rles[{i}]['counts']", backend
    )
    words = masks_of_runs_op(counts, begins, ends, *size, backend=backend)
    return PackedMasks._of(words, size[1], area).to(device)


def counts_of_masks(masks: PackedMasks, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The counts of all masks, one mask after the other, and the end of each mask's counts: both on the CPU."""
    runs = count_runs_op(masks.words, masks.boxes, masks.width, backend=backend)
    ends = runs.cumsum(0)
    total = ends[-1].item() if len(masks) else 0
    counts = run_lengths_op(masks.words, masks.boxes, masks.width, ends, total, backend=backend)
    return counts.cpu(), ends.cpu()


def read_rles(
    given: Sequence, sizes: Sequence[tuple[int, int]], name: Callable[[int], str], backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts of all masks, the begin and end of each mask's counts, and the area of each mask.

    given: counts of each mask, as text or ints; sizes: (H, W) of each; name(i): how an error of mask i begins.
    """
    lists, texts = {}, {}
    for i, counts in enumerate(given):
        if isinstance(counts, (bytes, bytearray)):
            texts[i] = counts
        elif isinstance(counts, str):
            texts[i] = counts.encode("utf-8", "surrogatepass")
        else:
            lists[i] = _listed(name, i, counts, sizes[i])
    lengths = torch.tensor([len(text) for text in texts.values()], dtype=torch.int64)
    ends = lengths.cumsum(0)
    joined = b"".join(texts.values())
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    read, numbers = read_counts_op(text, ends, backend=backend)
    counts = torch.from_numpy(numpy.concatenate([read.numpy(), *lists.values()])) if lists else read
    begins, lasts = torch.empty(len(given), dtype=torch.int64), torch.empty(len(given), dtype=torch.int64)
    places = torch.tensor([*texts], dtype=torch.int64)
    if len(places) and numbers.min() < 0:
        wrong = int(numbers.argmin())
        i, reason = int(places[wrong]), _REASONS[int(numbers[wrong])]
        raise ValueError(f"{name(i)}={given[i]!r:.80} {reason}")
    begins[places], lasts[places] = ends - lengths, ends - lengths + numbers
    first = len(text)
    for i, values in lists.items():
        begins[i], lasts[i] = first, first + len(values)
        first += len(values)
    covered, area = run_statistics_op(counts, begins, lasts, backend=backend)
    pixels = torch.tensor([height * width for height, width in sizes], dtype=torch.int64)
    if not torch.equal(covered, pixels):
        i = int((covered != pixels).nonzero()[0])
        allowed = f"{int(pixels[i])}, {sizes[i][0]} x {sizes[i][1]}"
        raise ValueError(f"{name(i)} add up to {int(covered[i])}; allowed: {allowed}")
    return counts, begins, lasts, area


_REASONS = {
    reference.BAD_CHARACTER: "holds a character that is none of the encoding; allowed: '0' to 'o'",
    reference.TRUNCATED: "ends within a count; allowed: a last character below 'P'",
    reference.OUT_OF_RANGE: f"holds a count out of range; allowed: 0 to {MOST_PIXELS}",
}


def _listed(name: Callable[[int], str], i: int, counts, size: tuple[int, int]) -> numpy.ndarray:
    """Uncompressed counts as int64."""
    values = numpy.asarray(counts) if isinstance(counts, (Sequence, numpy.ndarray)) else None
    if values is not None and values.ndim == 1 and len(values) == 0:
        values = values.astype(numpy.int64)
    if values is None or values.ndim != 1 or values.dtype.kind not in "iu":
        raise TypeError(f"{name(i)}={counts!r:.80}; allowed: bytes, str, or ints")
    most = size[0] * size[1]
    if len(values) and not (0 <= values.min() and values.max() <= most):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name(i)} holds {wrong}; allowed: 0 to {most}")
    return values.astype(numpy.int64)


def _size(name: str, argument: str, value) -> tuple[int, int]:
    """(H, W) as ints."""
    values = _check.integers(name, argument, value, "two ints, (H, W)")
    if len(values) != 2 or min(values) < 0:
        raise ValueError(f"fastseg.ops.{name}: {argument}={value!r}; allowed: two ints of 0 or more, (H, W)")
    return values[0], values[1]


def _check_pixels(name: str, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"fastseg.ops.{name}: masks of {height} x {width}; allowed: at most {MOST_PIXELS} pixels")
