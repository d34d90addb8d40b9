"""`PackedMasks`: N binary masks of one size, a bit per pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastseg import _check
from fastseg.kernels.pack_masks.reference import WORD, words_in_row
from fastseg.ops.masks.statistics import mask_statistics_op

_NAME = "PackedMasks"
MOST_ON_A_SIDE = 2**31 - 1  # pixels: boxes are 32-bit numbers


class PackedMasks:
    """N binary masks of H x W pixels, a bit per pixel: what `fastseg.ops.pack_masks` returns and mask ops take.

    Bit b of word w of a row is pixel x = 32 w + b (the lowest bit is the leftmost pixel); the bits past the end of a
    row are 0. The masks are not changed in place: area and boxes are found once and kept.

        masks = fastseg.ops.pack_masks(probabilities, 0.5)
        masks = masks[masks.area > 0]
        largest = masks[masks.area.argmax().item()]
        both, either = masks[0] & masks[1], masks[0] | masks[1]

    Args:
        words: int32 (N, H, ceil(width / 32)).
        width: W.

    Attributes:
        words, width: as above; also height, device, shape (N, H, W).
        area: int64 (N), the number of pixels of each mask.
        boxes: int32 (N, 4), the smallest box (x1, y1, x2, y2) around each mask's pixels, with x1 <= x < x2 and
            y1 <= y < y2: the whole image is (0, 0, W, H), an empty mask (0, 0, 0, 0).

    Raises:
        RuntimeError: words of another dtype or shape; on CPU, words with bits past the end of a row.
        TypeError, ValueError: a width that is no integer, negative, or above 2^31 - 1.
    """

    def __init__(self, words: Tensor, width: int):
        _check.tensor(_NAME, "words", words)
        try:
            width = _check.integer(width)
        except TypeError as error:
            raise TypeError(f"fastseg.ops.{_NAME}: width={width!r}; allowed: an int") from error
        if width < 0 or width > MOST_ON_A_SIDE:
            raise ValueError(f"fastseg.ops.{_NAME}: width={width}; allowed: 0 to {MOST_ON_A_SIDE}")
        count = words_in_row(width)
        _check.argument(_NAME, "words", words, (torch.int32,), ("N", "H", count), f"words of {width} pixels")
        tail = width % WORD
        if tail and _check.may_look_at(words) and not torch.compiler.is_compiling():
            if (words[..., -1] & ~_low_bits(tail)).any():
                where = f"past pixel {width - 1} of a row"
                raise RuntimeError(f"fastseg.ops.{_NAME}: words has bits set {where}; allowed: none")
        self.words, self.width = words, width
        self._area: Tensor | None = None
        self._boxes: Tensor | None = None

    @classmethod
    def _of(cls, words: Tensor, width: int, area: Tensor | None = None, boxes: Tensor | None = None) -> "PackedMasks":
        """From the result of an op of this library, without checks."""
        masks = cls.__new__(cls)
        masks.words, masks.width, masks._area, masks._boxes = words, width, area, boxes
        return masks

    @property
    def height(self) -> int:
        return self.words.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.words.shape[0], self.words.shape[1], self.width

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def area(self) -> Tensor:
        return self._statistics()[0] if self._area is None else self._area

    @property
    def boxes(self) -> Tensor:
        return self._statistics()[1] if self._boxes is None else self._boxes

    def _statistics(self) -> tuple[Tensor, Tensor]:
        self._area, self._boxes = found = mask_statistics_op(self.words)
        return found

    def __len__(self) -> int:
        return self.words.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "PackedMasks":
        """Some of the masks: one (`len` 1) by an int, several by a slice, a list of ints, or a 1-d tensor of indices
        (any integer dtype) or of N booleans.
        """
        if isinstance(index, slice):
            return self._map(lambda part: part[index])
        if isinstance(index, Tensor) and index.dim() > 0:
            if index.dtype == torch.bool:
                _check.shape(_NAME, "index", index, (len(self),), "a boolean for each mask")
            elif index.dim() != 1 or index.is_floating_point() or index.is_complex():
                raise IndexError(
                    f"fastseg.ops.{_NAME}: index has dtype {_check.dtype_name(index.dtype)} and shape "
                    f"{tuple(index.shape)}; allowed: a 1-d tensor of integers, or of a boolean for each mask"
                )
            return self._map(lambda part: part[index])
        if isinstance(index, (list, range)):
            places = _check.integers(_NAME, "index", list(index), "ints")
            for place in places:
                self._check_place(place)
            return self[torch.tensor(places, dtype=torch.int64, device=self.device)]
        try:
            if isinstance(index, bool):
                raise TypeError("bool")
            place = _check.integer(index)
        except TypeError as error:
            allowed = "an int, a slice, a list of ints, or a 1-d tensor"
            raise TypeError(f"fastseg.ops.{_NAME}: index={index!r}; allowed: {allowed}") from error
        self._check_place(place)
        place = place % len(self)
        return self._map(lambda part: part[place : place + 1])

    def _check_place(self, place: int) -> None:
        if not -len(self) <= place < len(self):
            raise IndexError(f"fastseg.ops.{_NAME}: index={place}; allowed: {-len(self)} to {len(self) - 1}")

    def __iter__(self):
        return (self[place] for place in range(len(self)))

    def _map(self, change) -> "PackedMasks":
        """Applies `change` to the words and, where known, to areas and boxes."""
        known = [None if part is None else change(part) for part in (self._area, self._boxes)]
        return PackedMasks._of(change(self.words), self.width, *known)

    def __and__(self, other: "PackedMasks") -> "PackedMasks":
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: "PackedMasks") -> "PackedMasks":
        return self._combine(other, torch.bitwise_or)

    def _combine(self, other, operation) -> "PackedMasks":
        if not isinstance(other, PackedMasks):
            return NotImplemented
        check_same_size(_NAME, "other", other, "self", self)
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise RuntimeError(f"fastseg.ops.{_NAME}: other holds {len(other)} masks; allowed: {len(self)}, or one")
        return PackedMasks._of(operation(self.words, other.words), self.width)

    @staticmethod
    def cat(masks: Sequence["PackedMasks"]) -> "PackedMasks":
        """The masks of several `PackedMasks` of one size and device, one after the other."""
        masks = list(masks)
        if not masks or not all(isinstance(one, PackedMasks) for one in masks):
            kinds = ", ".join(type(one).__name__ for one in masks)
            raise TypeError(f"fastseg.ops.{_NAME}.cat: masks is [{kinds}]; allowed: a list of one PackedMasks or more")
        for one in masks[1:]:
            check_same_size(f"{_NAME}.cat", "masks", one, "the first", masks[0])
        known = []
        for given in ([one._area for one in masks], [one._boxes for one in masks]):
            parts = [part for part in given if part is not None]
            known.append(torch.cat(parts) if len(parts) == len(masks) else None)
        return PackedMasks._of(torch.cat([one.words for one in masks]), masks[0].width, *known)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "PackedMasks":
        """The masks on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def cpu(self) -> "PackedMasks":
        return self.to("cpu")

    def crop(self, x1: int, y1: int, x2: int, y2: int) -> "PackedMasks":
        """The window of pixels x1 <= x < x2, y1 <= y < y2 of every mask, which must lie inside the image."""
        values = _check.integers(f"{_NAME}.crop", "window", [x1, y1, x2, y2], "four ints x1, y1, x2, y2")
        x1, y1, x2, y2 = values
        if not (0 <= x1 <= x2 <= self.width and 0 <= y1 <= y2 <= self.height):
            raise ValueError(
                f"fastseg.ops.{_NAME}.crop: window={tuple(values)}; allowed: 0 <= x1 <= x2 <= {self.width} and "
                f"0 <= y1 <= y2 <= {self.height}"
            )
        width, shift = x2 - x1, x1 % WORD
        count, first = words_in_row(width), x1 // WORD
        rows = self.words[:, y1:y2]
        words = rows[..., first : first + count]
        if shift:
            high = rows[..., first + 1 : first + 1 + count] << (WORD - shift)
            words = (words >> shift) & _low_bits(WORD - shift)
            words[..., : high.shape[2]] |= high
        else:
            words = words.contiguous() if width % WORD == 0 else words.clone()
        if width % WORD:
            words[..., -1] &= _low_bits(width % WORD)
        return PackedMasks._of(words, width)

    def __repr__(self) -> str:
        count, height, width = self.shape
        return f"PackedMasks({count} masks of {height} x {width}, device='{self.device}')"


def _low_bits(count: int) -> int:
    """A word whose lowest `count` bits are set, count < 32."""
    return (1 << count) - 1


def check_same_size(op: str, name: str, masks: PackedMasks, other_name: str, other: PackedMasks) -> None:
    if masks.shape[1:] != other.shape[1:]:
        given, allowed = (" x ".join(map(str, one.shape[1:])) for one in (masks, other))
        raise RuntimeError(f"fastseg.ops.{op}: {name} holds masks of {given}; allowed: {allowed}, as of {other_name}")
    _check.same_device(op, name, masks.words, other_name, other.words)


def _parts(masks: PackedMasks):
    return [masks.words, masks._area, masks._boxes, masks.width], None


def _from_parts(parts, _) -> PackedMasks:
    words, area, boxes, width = parts
    return PackedMasks._of(words, width, area, boxes)


def _named_parts(masks: PackedMasks):
    parts, _ = _parts(masks)
    return [*zip(map(pytree.GetAttrKey, ("words", "_area", "_boxes", "width")), parts)], None


pytree.register_pytree_node(  # torch.export takes and returns only such classes
    PackedMasks,
    _parts,
    _from_parts,
    serialized_type_name="fastseg.ops.PackedMasks",
    flatten_with_keys_fn=_named_parts,
)
