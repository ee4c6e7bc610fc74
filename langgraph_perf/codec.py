"""Values to bytes and back: exactly, without pickle, without running any type's own code.

``decode(encode(value))`` equals ``value`` and has the same type at every level, or ``encode``
raises ``EncodeError``; nothing is ever rounded to a neighbouring type. ``decode`` takes hostile
bytes: it imports no module, calls no constructor, validator or hook of a user's class, and answers
damage of any kind with ``DecodeError``. (Elements of a set and keys of a dict are hashed: that one
method of a restored class does run.)

How payloads look is told in ``_codec_format``, which classes come back in ``Allowlist``.
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import BaseMessage

from langgraph_perf._codec_allowlist import Allowlist
from langgraph_perf._codec_decode import Decoder, decode_plain
from langgraph_perf._codec_encode import Encoder, Walker
from langgraph_perf._codec_format import COMPOSED, DecodeError, EncodeError
from langgraph_perf._codec_hints import types_in

__all__ = ["Allowlist", "DecodeError", "EncodeError", "decode", "encode", "types_in"]

_DEFAULT_ALLOWLIST = Allowlist()


def encode(value: Any, *, messages: list[BaseMessage] | None = None) -> bytes:
    """The bytes from which ``decode`` restores ``value``.

    References shared inside the value are stored once for each place.

    Args:
        messages: is filled with the LangChain messages met, inner ones first; ``decode`` lists the
            restored ones in the same order.

    Raises:
        EncodeError: something in the value cannot be restored exactly, or it contains itself.
    """
    encoder = Encoder()
    try:
        payload = encoder.encode(value)
    except TypeError:
        # EncodeError included: only the walk knows the path
        encoder = Walker()
        payload = encoder.encode(value)
    if messages is not None:
        messages[:] = encoder.messages if encoder.started else ()
    return payload


def decode(
    payload: bytes | memoryview,
    allowed: Allowlist | None = None,
    *,
    messages: list[BaseMessage] | None = None,
) -> Any:
    """A fresh copy of the value that ``encode`` was given.

    Args:
        allowed: classes to restore besides the built-in ones, and the mode.
        messages: is filled with the restored LangChain messages, inner ones first.

    Raises:
        DecodeError: the payload is damaged, of another format, or names a type that is absent,
            changed or not allowed.
    """
    decoder = None
    try:
        if payload[0] == COMPOSED:
            decoder = Decoder(allowed or _DEFAULT_ALLOWLIST)
            value = decoder.decode(memoryview(payload))
        else:
            value = decode_plain(payload)
    except DecodeError:
        raise
    except Exception as exc:
        if decoder is not None and decoder.abort is not None:
            raise decoder.abort from None
        raise DecodeError(f"damaged or foreign payload: {exc!r:.200}") from exc
    if messages is not None:
        messages[:] = decoder.messages if decoder is not None else ()
    return value
