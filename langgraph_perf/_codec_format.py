"""What encoding and decoding agree on: the layout of payloads, the kinds of records, the errors.

What msgpack has by itself (``None``, bool, 64-bit int, float, str, bytes, list, dict with str keys)
goes through ormsgpack at native speed. Every other object becomes a *record*, and an extension
value in its place refers to it by number::

    plain     msgpack [FORMAT, value]
    composed  C1 FORMAT, u32 count, count tags (u8), count sizes (u32), the bodies;
              little endian, the last record is the value itself

A record refers only to earlier ones and each is referred to at most once, so decoding is one loop
over the records, never a recursion, and a small payload cannot unfold into a large value. Record
bodies are msgpack ``[head, parts]``, or raw bytes for big integers, arrays and strings that UTF-8
cannot hold. C1 is the one byte that never begins a msgpack value.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, NoReturn

FORMAT = 1
"""Changes whenever old payloads could be misread; theirs are then refused."""
MAX_DEPTH = 128
"""How deep objects may nest: keeps both directions, and hashing what was decoded, within the C
stack."""
COMPOSED = 0xC1
HEAD = struct.Struct("<BBI")


class EncodeError(TypeError):
    """The value cannot be stored exactly.

    Attributes:
        reason: why.
        path: where in the value, for example ``result["client"]``.
    """

    def __init__(self, reason: str, path: str = "result") -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason
        self.path = path


class DecodeError(ValueError):
    """The bytes are damaged or foreign, or name a type that is absent, changed or not allowed."""


def damaged(what: str) -> NoReturn:
    """Refuse a payload that ``encode`` cannot have written."""
    raise DecodeError(f"damaged or foreign payload: {what}")


class Tag:
    """What a record is. Stored: only append, never renumber. (Not an enum: these are too hot.)"""

    ROOT = 0
    INT = 1
    STR = 2
    BYTEARRAY = 3
    COMPLEX = 4
    TUPLE = 5
    PAIRS = 6
    SET = 7
    FROZENSET = 8
    DEQUE = 9
    ORDERED = 10
    DEFAULT = 11
    COUNTER = 12
    MODEL = 13
    MODEL_V1 = 14
    RECORD = 15
    NAMED = 16
    ENUM = 17
    FLAG = 18
    TEXT = 19
    DATETIME = 20
    DATE = 21
    TIME = 22
    TIMEDELTA = 23
    TIMEZONE = 24
    ZONE = 25
    UUID = 26
    DECIMAL = 27
    FRACTION = 28
    PATH = 29
    RANGE = 30
    PATTERN = 31
    ADDRESS = 32
    ARRAY = 33
    SCALAR = 34
    OBJECTS = 35
    NP_TEXT = 36


class Form(enum.Enum):
    """What the parts of an object are, which decides how they are stored and named."""

    RAW = enum.auto()  # buffers, stored as they are
    ITEMS = enum.auto()  # values
    PAIRS = enum.auto()  # key, value, key, value
    ATTRIBUTES = enum.auto()  # dicts by attribute name, or None


RAW, ITEMS, PAIRS, ATTRIBUTES = Form
Parts = tuple[int, Form, Any, Sequence[Any]]
"""An object taken apart: tag, form, head (plain data) and parts."""
