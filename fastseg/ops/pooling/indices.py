"""`PoolIndices`: one-byte indices of a max pooling that behave as torch's int64 tensor."""

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from fastseg import _check
from fastseg import _private_api as private
from fastseg.kernels.pooling import index_formats as reference
from fastseg.ops.pooling.geometry import MAX_COMPACT_TAPS, check_geometry

_aten = torch.ops.aten
_ALIASES = (_aten.detach.default, _aten.alias.default)
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_lock = threading.RLock()  # reentrant: a dispatch mode may read the indices while they are computed


class _Content:
    """Shared by the aliases of one `PoolIndices`: offsets, flat indices (computed at the first use), or both.

    The offsets are dropped once the flat indices may have been written to, or may have a view.
    """

    __slots__ = ("flat", "offsets")

    def __init__(self, offsets, flat=None):
        self.offsets, self.flat = offsets, flat


class PoolIndices(Tensor):
    """The compact indices that ``fastseg.ops.max_pool2d(..., index_format="compact")`` returns.

    One byte per pooled element, an eighth of torch's int64 index: the offset ``kh * KW + kw`` of the maximum in
    its window. `fastseg.ops.max_unpool2d` reads these bytes. Otherwise it behaves as the int64 tensor of torch's
    max pooling: shape, dtype, device, strides and the result of every torch function, method, in-place change and
    conversion are the same. The first use as int64 converts the indices and keeps the result: memory grows by 8
    bytes per element. After an in-place change, or once there may be a view, only int64 is kept.

    Exceptions: the shape cannot be changed in place (``unsqueeze_``), there is no storage (``untyped_storage``), and in
    a graph of ``torch.compile`` or ``torch.export`` an in-place change is refused and views are copies.

    Args:
        offsets: uint8 (N, C, rows, columns) or (C, rows, columns), like the pool's output.
        input_size: (H, W) of the pool's input.
        kernel_size, stride, padding, dilation: of the pool, as `fastseg.ops.max_pool2d` takes them.

    Attributes:
        offsets: uint8, as above.
        input_size: (H, W) of the pool's input.
        kernel_size, stride, padding, dilation: of the pool, as pairs for height and width.

    Pickle and `torch.save` keep the compact form: ``import fastseg`` before loading it. A program of ``torch.export``
    may make, unpool with, return and take them (then without ``run_decompositions``).

    Raises:
        RuntimeError: offsets of another dtype or shape, a geometry that no pool has, a kernel of more than 255 taps,
            an `input_size` that gives another number of rows or columns.
        TypeError: arguments of other types.
    """

    def __new__(
        cls,
        offsets: Tensor,
        input_size: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ):
        name = "PoolIndices"
        _check.tensor(name, "offsets", offsets)
        _check.dtype(name, "offsets", offsets, (torch.uint8,))
        _check_dimensions(name, "offsets", offsets)
        size, geometry = _size_and_geometry(name, offsets, input_size, kernel_size, stride, padding, dilation)
        return cls._of_pool(offsets, size, *geometry)

    __module__ = "fastseg.ops"  # the name under which it is pickled

    # The default of Tensor would convert results to this class.
    __torch_function__ = private.no_torch_function

    @property
    def offsets(self) -> Tensor:
        content = self._content
        if content.offsets is not None:
            return content.offsets
        return _offsets("PoolIndices", content.flat, self.input_size, self.geometry)

    @property
    def input_size(self) -> tuple[int, int]:
        _, height, width = self._plane.shape
        return height, width

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.geometry[0]

    @property
    def stride(self) -> "_Stride":
        stride = _Stride(self.geometry[1])
        stride.tensor = self
        return stride

    @property
    def padding(self) -> tuple[int, int]:
        return self.geometry[2]

    @property
    def dilation(self) -> tuple[int, int]:
        return self.geometry[3]

    @property
    def is_compact(self) -> bool:
        """True if the offsets are valid: not after an in-place change, or if there may be views."""
        return self._content.offsets is not None

    def to_flat(self) -> Tensor:
        """The int64 indices ``y * W + x`` that torch's max pooling returns for the same input."""
        if not self.is_compact:
            return self._flat_content.clone()
        offsets = self.offsets
        flat = reference.flat_from_offsets(offsets, self.input_size, *self.geometry)
        if type(flat) is Tensor and flat.stride() != offsets.stride():
            flat = torch.empty_like(offsets, dtype=torch.int64).copy_(flat)
        return flat

    @classmethod
    def _of_pool(cls, offsets: Tensor, input_size, kernel_size, stride, padding, dilation) -> "PoolIndices":
        """The constructor without checks, for the result of a pool and a geometry of pairs."""
        if torch.compiler.is_dynamo_compiling():
            _allow_in_graph()
        height, width = input_size
        return _wrap(offsets, height, width, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))

    @classmethod
    def from_flat(
        cls,
        indices: Tensor,
        input_size: Sequence[int],
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> "PoolIndices":
        """The compact form of torch's int64 indices of a max pooling with this geometry.

        Args:
            indices: int64 (N, C, rows, columns) or (C, rows, columns).
            input_size: (H, W) of the pool's input, or the whole shape of it.
            kernel_size, stride, padding, dilation: of the pool, as `fastseg.ops.max_pool2d` takes them.

        Raises:
            RuntimeError: an index that is not a tap of its window, a kernel of more than 255 taps, another dtype.
        """
        name = "PoolIndices.from_flat"
        _check.tensor(name, "indices", indices)
        _check.dtype(name, "indices", indices, (torch.int64,))
        _check_dimensions(name, "indices", indices)
        geometry = kernel_size, stride, padding, dilation
        size, geometry = _size_and_geometry(name, indices, tuple(input_size)[-2:], *geometry)
        if isinstance(indices, PoolIndices):
            indices = indices.to_flat()
        return cls._of_pool(_offsets(name, indices, size, geometry), size, *geometry)

    # ---- tensor behaviour ----

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ALIASES:
            alias = _wrapper(args[0]._content, args[0]._plane, args[0].geometry, type(args[0]))
            return return_and_correct_aliasing(func, args, kwargs, alias)
        if func in _COPIES and args[0].is_compact and _stays_int64(kwargs):
            options = {name: value for name, value in kwargs.items() if name != "dtype"}
            offsets = func(args[0].offsets, **options)
            return _wrapper(_Content(offsets), args[0]._plane.to(offsets.device), args[0].geometry, type(args[0]))
        written = []
        args, kwargs = _flat_arguments(func, args, kwargs, written)
        if written and torch.Tag.inplace_view in func.tags:
            raise RuntimeError(
                f"fastseg.ops.PoolIndices: {func} changes their shape in place; allowed: on to_flat() only"
            )
        result = func(*args, **kwargs)
        return next((indices for indices, flat in written if result is flat), result)

    def __tensor_flatten__(self):
        return ["offsets" if self.is_compact else "_flat_content", "_plane"], self.geometry

    @staticmethod
    def __tensor_unflatten__(parts, geometry, outer_size, outer_stride):
        content = _Content(parts.get("offsets"), parts.get("_flat_content"))
        return _wrapper(content, parts["_plane"], geometry)

    def _stable_hash_for_caching(self) -> str:  # key of torch.compile's cache on disk
        name = self.__tensor_flatten__()[0][0]
        part = getattr(self, name)
        return str((type(self), name, part.shape, part.stride(), part.device, self.input_size, self.geometry))

    @property
    def _flat_content(self):
        return self._content.flat

    def _shared_flat(self, keep_offsets: bool) -> Tensor:
        """The int64 tensor of these indices and all their aliases. Without `keep_offsets` the offsets are dropped, so
        that the caller may change it.
        """
        content = self._content
        with _lock:
            if content.flat is None:
                with torch.inference_mode(False):  # the tensor may outlive the caller's inference mode
                    flat = self.to_flat()
                if type(flat) is not Tensor:  # a tracer's tensor: valid in this call only, never changed
                    return flat
                content.flat = flat
            if not keep_offsets:
                content.offsets = None
            return content.flat

    # Methods that access the memory without the dispatcher.

    def tolist(self) -> list:
        return self._shared_flat(keep_offsets=True).tolist()

    def numpy(self, *, force: bool = False):
        return self._shared_flat(keep_offsets=False).numpy(force=force)

    def __dlpack__(self, **options):
        return self._shared_flat(keep_offsets=False).__dlpack__(**options)

    def data_ptr(self) -> int:
        return self._shared_flat(keep_offsets=False).data_ptr()

    def const_data_ptr(self) -> int:
        return self._shared_flat(keep_offsets=False).const_data_ptr()

    def share_memory_(self) -> "PoolIndices":
        self._shared_flat(keep_offsets=False).share_memory_()
        return self

    def apply_(self, function) -> "PoolIndices":
        self._shared_flat(keep_offsets=False).apply_(function)
        return self

    def map_(self, tensor, function) -> "PoolIndices":
        self._shared_flat(keep_offsets=False).map_(_replaced(tensor, PoolIndices.to_flat), function)
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        if type(self._plane) is Tensor:
            return repr(self._shared_flat(keep_offsets=True))
        return f"PoolIndices({self._content.offsets}, {self.input_size}, *{self.geometry})"

    def __copy__(self) -> "PoolIndices":
        return self.detach()

    def __deepcopy__(self, memo) -> Tensor:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol):
        if self.is_compact:
            return PoolIndices, (self.offsets, self.input_size, *self.geometry)
        return self._content.flat.__reduce_ex__(protocol)


class _ExportedPoolIndices(PoolIndices):
    """Indices in a program that is being exported: a pytree node. The program returns offsets and sizes; the caller's
    `PoolIndices` are made of these. Other ops cannot take them, because dispatch modes flatten pytree nodes.
    """


class _Stride(tuple):
    """The pool's stride; if called, the tensor's stride, since both have this name."""

    def __call__(self, *dim):
        return Tensor.stride(self.tensor, *dim)


def _wrap(offsets, height, width, *geometry):
    """In a traced graph this function is one node; the indices are its output."""
    exporting = torch.compiler.is_exporting() and type(offsets) is not Tensor  # Tensor: another thread exports
    kind = _ExportedPoolIndices if exporting else PoolIndices
    return _wrapper(_Content(offsets), offsets.new_empty((0, height, width)), geometry, kind)


def _offsets_in_graph(indices):
    return indices.offsets


def offsets_of(indices: PoolIndices) -> Tensor:
    """``indices.offsets``, also in a traced graph, where Dynamo may treat an attribute of an argument as a constant."""
    if torch.compiler.is_dynamo_compiling():
        _allow_in_graph()
        return _offsets_in_graph(indices)
    return indices.offsets


def _allow_in_graph():
    """Dynamo calls this while it traces: at import it would take a second in every process."""
    torch._dynamo.allow_in_graph([_wrap, _offsets_in_graph])


_allow_in_graph._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does


def _wrapper(content, plane, geometry, kind=PoolIndices) -> PoolIndices:
    like = content.flat if content.offsets is None else content.offsets
    indices = Tensor._make_wrapper_subclass(
        kind, like.shape, strides=like.stride(), dtype=torch.int64, device=like.device
    )
    private.refuse_data_pointer(indices)
    indices._content, indices._plane, indices.geometry = content, plane, geometry
    return indices


def _flat_arguments(func, args, kwargs, written):
    """(args, kwargs) of an op with int64 tensors for `PoolIndices`; adds both to `written` if the op changes them."""
    schema = getattr(func, "_schema", None)  # higher-order ops have none
    declared = schema.arguments if schema is not None else ()
    aliasing = {argument.name: argument.alias_info for argument in declared if argument.alias_info is not None}

    declares_writes = getattr(func, "namespace", None) != "c10d"  # collectives write to arguments without saying so

    def flat(indices, alias):
        found = indices._shared_flat(keep_offsets=alias is None and declares_writes)
        if alias is not None and alias.is_write:
            if found is not indices._flat_content:
                raise RuntimeError(
                    f"fastseg.ops.PoolIndices: {func} changes them in place in a traced graph; "
                    "allowed: on to_flat() only"
                )
            written.append((indices, found))
        return found

    names = [argument.name for argument in declared] + [None] * len(args)
    change = {name: functools.partial(flat, alias=aliasing.get(name)) for name in (*names, *kwargs)}
    return (
        [_replaced(value, change[name]) for name, value in zip(names, args)],
        {name: _replaced(value, change[name]) for name, value in kwargs.items()},
    )


def _replaced(value, change):
    """`value` with each `PoolIndices` in it, also in sequences, replaced by `change` of it."""
    if isinstance(value, PoolIndices):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(entry, change) for entry in value])
    return value


def _stays_int64(kwargs) -> bool:
    """True if a copy with these arguments is still a strided int64 tensor."""
    return kwargs.get("dtype") in (None, torch.int64) and kwargs.get("layout") in (None, torch.strided)


def _offsets(name, flat, size, geometry) -> Tensor:
    offsets, inside = reference.offsets_from_flat(flat, size, *geometry)
    if not inside.all():
        wrong = flat[~inside][0].item()
        raise RuntimeError(f"fastseg.ops.{name}: indices holds {wrong}; allowed: the taps of its window")
    return offsets


def _check_dimensions(name, argument, value):
    if value.dim() not in (3, 4):
        raise RuntimeError(
            f"fastseg.ops.{name}: {argument} has shape {tuple(value.shape)}; "
            "allowed: (N, C, rows, columns) or (C, rows, columns)"
        )


def _size_and_geometry(name, pooled, input_size, kernel_size, stride, padding, dilation):
    """(input_size, geometry) as tuples. Raises unless such a pool gives the rows and columns of `pooled`."""
    kernel_size = tuple(_check.pair(name, "kernel_size", kernel_size))
    stride = kernel_size if stride is None else tuple(_check.pair(name, "stride", stride))
    padding, dilation = tuple(_check.pair(name, "padding", padding)), tuple(_check.pair(name, "dilation", dilation))
    geometry = kernel_size, stride, padding, dilation
    check_geometry(name, *geometry)
    taps = kernel_size[0] * kernel_size[1]
    if taps > MAX_COMPACT_TAPS:
        raise RuntimeError(
            f"fastseg.ops.{name}: kernel_size={kernel_size} has {taps} taps; allowed: at most {MAX_COMPACT_TAPS}"
        )
    try:
        height, width = (_check.integer(extent) for extent in input_size)
    except (TypeError, ValueError) as error:
        raise TypeError(f"fastseg.ops.{name}: input_size={input_size!r}; allowed: (H, W), two ints") from error
    for count, extent, *axis in zip(pooled.shape[-2:], (height, width), *geometry):
        if type(count) is type(extent) is int and count not in _counts(extent, *axis):
            raise RuntimeError(
                f"fastseg.ops.{name}: input_size={(height, width)}; allowed: one from which a pool with "
                f"kernel_size={geometry[0]}, stride={geometry[1]}, padding={geometry[2]}, dilation={geometry[3]} makes "
                f"{tuple(pooled.shape[-2:])}"
            )
    return (height, width), geometry


def _counts(extent, kernel, stride, padding, dilation):
    """How many windows fit along an axis, without and with ceil_mode."""
    if extent < 1:
        return ()
    span = extent + 2 * padding - dilation * (kernel - 1) - 1
    ceiled = -(-span // stride) + 1
    if (ceiled - 1) * stride >= extent + padding:
        ceiled -= 1
    return span // stride + 1, ceiled


def _parts(indices: _ExportedPoolIndices):
    return [indices.offsets, *indices.input_size], indices.geometry


def _from_parts(parts, geometry) -> PoolIndices:
    if not isinstance(parts[0], Tensor):
        raise RuntimeError(
            "fastseg.ops.PoolIndices: in an exported program they may only be unpooled with or returned; "
            "allowed for all else: index_format='flat', or to_flat()"
        )
    return PoolIndices(parts[0], parts[1:], *geometry)


pytree.register_pytree_node(
    _ExportedPoolIndices,
    _parts,
    _from_parts,
    serialized_type_name="fastseg.ops.PoolIndices",
    to_dumpable_context=lambda geometry: [list(entry) for entry in geometry],
    from_dumpable_context=lambda geometry: tuple(tuple(entry) for entry in geometry),
    flatten_with_keys_fn=lambda indices: (
        list(zip(map(pytree.GetAttrKey, ("offsets", "height", "width")), _parts(indices)[0])),
        indices.geometry,
    ),
)
torch.serialization.add_safe_globals([PoolIndices])  # it holds only a tensor and numbers
