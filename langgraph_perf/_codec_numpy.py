"""numpy arrays and scalars: taken apart and put together.

numpy is never imported here: a process without it holds no arrays, and misses those of others.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from typing import Any

from ormsgpack import packb

from langgraph_perf._codec_format import ITEMS, RAW, DecodeError, EncodeError, Parts, Tag, damaged
from langgraph_perf._msgpack import unpackb


def numpy_writer(cls: type) -> Callable[[Any], Parts] | None:
    """What takes instances of ``cls`` apart if it is one of numpy's types."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if cls is numpy.ndarray:
            return _write_array
        if issubclass(cls, numpy.generic):
            return _write_scalar
    return None


def _numpy() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        raise DecodeError("holds numpy data, and this process has not imported numpy")
    return numpy


# -- arrays ---------------------------------------------------------------------------------------


def _write_array(obj: Any) -> Parts:
    fortran = obj.flags.f_contiguous and not obj.flags.c_contiguous
    order = "F" if fortran else "C"
    if obj.dtype == object:
        return Tag.OBJECTS, ITEMS, [list(obj.shape), order], obj.ravel(order).tolist()
    numpy = _numpy()
    spec = _dtype_spec(obj.dtype)
    if obj.dtype.itemsize == 0:
        raise EncodeError(f"an array of dtype {obj.dtype}, which has no size, cannot be stored")
    head = packb([spec, list(obj.shape), order])
    raw = numpy.ascontiguousarray(obj.T if fortran else obj).reshape(-1).view(numpy.uint8)
    return Tag.ARRAY, RAW, None, [len(head).to_bytes(4, "little"), head, raw.data]


def _read_array(body: memoryview) -> Any:
    start = 4 + int.from_bytes(body[:4], "little")
    spec, shape, order = unpackb(body[4:start])
    raw = body[start:]
    dtype = _dtype(spec)
    numpy = _numpy()
    size = _size(shape)
    # checked before numpy sees the shape: an array never takes more room than the payload
    if not dtype.itemsize or size * dtype.itemsize != len(raw):
        damaged("has an array of the wrong size")
    if not size:
        return numpy.empty(shape, dtype, order)
    # a copy, so that it is writable and aligned; numpy's own leaves out the gaps between fields
    if dtype.names is not None:
        return numpy.ndarray(tuple(shape), dtype, bytearray(raw), order=order)
    return numpy.ndarray(tuple(shape), dtype, raw, order=order).copy(order)


def _read_objects(head: Any, parts: list[Any]) -> Any:
    shape, order = head
    if _size(shape) != len(parts):
        damaged("has an array of the wrong size")
    flat = _numpy().empty(len(parts), object)
    for i, part in enumerate(parts):  # one by one: numpy would unpack lists
        flat[i] = part
    return flat.reshape(shape, order=order)


def _size(shape: Any) -> int:
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        damaged("has an array of no shape")
    return math.prod(shape)


# -- scalars --------------------------------------------------------------------------------------


def _write_scalar(obj: Any) -> Parts:
    numpy = _numpy()
    cls = type(obj)
    # arrays drop trailing zeros of these two
    if cls is numpy.str_:
        return Tag.NP_TEXT, ITEMS, None, [str.__str__(obj)]  # str() drops them too
    if cls is numpy.bytes_:
        return Tag.NP_TEXT, ITEMS, None, [bytes(obj)]
    array = numpy.asarray(obj)
    if array.dtype == object or type(array[()]) is not cls:
        raise EncodeError(f"a {cls.__module__}.{cls.__qualname__} cannot be stored")
    _, form, head, parts = _write_array(array)
    return Tag.SCALAR, form, head, parts


def _read_scalar(body: memoryview) -> Any:
    return _read_array(body)[()]


def _read_text(_: Any, parts: list[Any]) -> Any:
    (text,) = parts
    numpy = _numpy()
    return numpy.str_(text) if type(text) is str else numpy.bytes_(bytes(memoryview(text)))


# -- dtypes ---------------------------------------------------------------------------------------

_DTYPE = re.compile(r"[<>|=]?(?:[biufcSUVmM]\d{0,9}|[?bBhHiIlLqQpPefdgFDG])(?:\[\w+\])?", re.ASCII)


def _dtype_spec(dtype: Any) -> Any:
    """A dtype as plain data.

    Raises:
        EncodeError: it holds objects, or the plain data would not lead back to it.
    """
    spec: Any
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _dtype_spec(base), "shape": list(shape)}
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        spec = {
            "names": list(dtype.names),
            "formats": [_dtype_spec(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
            "aligned": dtype.isalignedstruct,
        }
    else:
        order = ">" if dtype.byteorder == ">" else ""
        # the character keeps apart what the string does not, such as long and long long
        for spec in (dtype.str, order + dtype.char):
            if _DTYPE.fullmatch(spec) and _dtype(spec).type is dtype.type:
                break
    try:
        back = _dtype(spec)
    except DecodeError:
        back = None
    if back is None or back != dtype or back.type is not dtype.type or dtype.metadata:
        raise EncodeError(f"an array of dtype {dtype} cannot be stored")
    return spec


def _dtype(spec: Any) -> Any:
    numpy = _numpy()
    if type(spec) is str:
        if not _DTYPE.fullmatch(spec):
            damaged(f"has no dtype where one belongs, but {spec[:40]!r}")
        return numpy.dtype(spec)
    if "base" in spec:
        return numpy.dtype((_dtype(spec["base"]), tuple(spec["shape"])))
    fields = {**spec, "formats": [_dtype(part) for part in spec["formats"]]}
    if not any(fields["titles"]):
        del fields["titles"]
    aligned = fields.pop("aligned")
    return numpy.dtype(fields, align=aligned)


RAW_READERS: dict[int, Callable[[memoryview], Any]] = {
    Tag.ARRAY: _read_array,
    Tag.SCALAR: _read_scalar,
}
"""From the bytes."""
READERS: dict[int, Callable[[Any, list[Any]], Any]] = {
    Tag.OBJECTS: _read_objects,
    Tag.NP_TEXT: _read_text,
}
"""From head and parts."""
