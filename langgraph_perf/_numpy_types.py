"""How numpy's scalars and arrays are encoded. Imported only once numpy has been."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langgraph_perf._canonical import Encoder, Plan, Unkeyable, refuse, text, type_name

if TYPE_CHECKING:
    import numpy as np

_RAW_KINDS = frozenset("biufcmMSUV")


def numpy_plan(kind: type, mro: tuple[type, ...]) -> Plan | None:
    """The plan of a numpy type, or ``None``."""
    import numpy as np

    if np.generic in mro:
        return _scalar
    if kind is np.ndarray:
        return _array
    if np.dtype in mro:
        return lambda encoder, value: b"D" + _dtype(value)
    if np.ndarray in mro:
        return refuse(kind, "is a subclass of numpy.ndarray, which may hold more than its array")
    return None


def _scalar(encoder: Encoder, value: np.generic) -> bytes:
    import numpy as np

    return b"x" + _array(encoder, np.asarray(value))


def _array(encoder: Encoder, value: np.ndarray[Any, Any]) -> bytes:
    shape = b",".join(b"%d" % size for size in value.shape)
    return b"A%b(%b)%b" % (_dtype(value.dtype), shape, _items(encoder, value))


def _dtype(dtype: np.dtype[Any]) -> bytes:
    """A dtype by its name, byte order, unit and fields.

    ``dtype.str`` alone calls every extension type of one size the same, hence the scalar's type.
    """
    base, shape = dtype.subdtype or (dtype, ())
    members: Any = base.fields or {}
    fields = b"".join(
        text(name) + b"%d:" % members[name][1] + _dtype(members[name][0])
        for name in base.names or ()
    )
    names = text(f"{base.str} {type_name(base.type)} {base.itemsize} {shape}")
    return b"%b%d:%b" % (names, len(base.names or ()), fields)


def _items(encoder: Encoder, value: np.ndarray[Any, Any]) -> bytes:
    import numpy as np

    dtype = value.dtype
    if dtype.names:  # by field, because the padding between them is arbitrary
        return b"".join(_items(encoder, value[name]) for name in dtype.names)
    if dtype.kind in "OT":  # objects, and strings kept as pointers
        return encoder.encode(value.reshape(-1).tolist())
    if dtype.kind not in _RAW_KINDS or dtype.char in "gG":
        raise Unkeyable("", f"a numpy array of {dtype.name}: its bytes do not determine its values")
    if dtype.kind in "fc" and np.isnan(value).any():
        value = value.copy()
        if dtype.kind == "c":  # every NaN the same, whichever half holds it
            value.real[np.isnan(value.real)] = np.nan
            value.imag[np.isnan(value.imag)] = np.nan
        else:
            value[np.isnan(value)] = np.nan
    raw = value.tobytes()  # in C order, whatever the memory layout
    return b"%d:%b" % (len(raw), raw)
