"""Values to bytes and back, exactly (placeholder: see the codec's own commit)."""

from __future__ import annotations

from typing import Any


class EncodeError(TypeError):
    """The value cannot be stored; says where in it and why."""


class DecodeError(ValueError):
    """The bytes are damaged, foreign, or name a type that is not allowed."""


def encode(value: Any) -> bytes:
    raise NotImplementedError


def decode(payload: bytes) -> Any:
    raise NotImplementedError
