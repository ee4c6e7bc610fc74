"""Reading msgpack that anybody may have written.

ormsgpack before 1.13, beyond which Python 3.10 gets none, makes room for as many items as a header
claims to follow, and crashes the process where that is absurd: there, headers are looked at first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ormsgpack

__all__ = ["unpackb"]

# how many bytes follow a type byte that is neither a small number nor a short container or text
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_FIXED |= {0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
# how many bytes hold a length, and how many follow besides
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_SIZED |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
# how many bytes hold a number of items, and how many values an item has
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def require_honest(raw: bytes | memoryview) -> None:
    """See that no header claims more values than there are bytes left.

    Raises:
        ValueError: one does.
    """
    raw = bytes(raw)
    if b"\xdd" not in raw and b"\xdf" not in raw:
        return  # short containers cost little
    at, left, end = 0, 1, len(raw)
    while left:
        if at >= end or left > end - at:
            raise ValueError("msgpack: a header claims more than there is")
        kind = raw[at]
        at, left = at + 1, left - 1
        if kind in _NESTED:
            size, each = _NESTED[kind]
            left += each * int.from_bytes(raw[at : at + size], "big")
            at += size
        elif kind in _SIZED:
            size, more = _SIZED[kind]
            at += size + more + int.from_bytes(raw[at : at + size], "big")
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif 0x80 <= kind < 0x90:
            left += 2 * (kind & 15)
        elif 0x90 <= kind < 0xA0:
            left += kind & 15
        elif 0xA0 <= kind < 0xC0:
            at += kind & 31


def checked_unpackb(raw: bytes | memoryview, **options: Any) -> Any:
    """``ormsgpack.unpackb``, after a look at the headers."""
    require_honest(raw)
    return ormsgpack.unpackb(raw, **options)


_TRUSTED = (1, 13)
unpackb: Callable[..., Any] = (
    ormsgpack.unpackb
    if tuple([int(part) for part in ormsgpack.__version__.split(".")[:2]]) >= _TRUSTED
    else checked_unpackb
)
"""``ormsgpack.unpackb``, safe for any bytes; raises ``ValueError`` for what is not msgpack."""
