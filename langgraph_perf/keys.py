"""Digests of what a node is called with.

Equal values give equal digests in every process; unequal ones differ, by type as well as by value;
what cannot be keyed raises ``Unkeyable`` with the path to it, and is never guessed at. Messages
count by content, see ``_message_rows``. The hashes are BLAKE2b, of 160 bits, and SHA-256, so
nobody can make two inputs share a key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import MAX_DEPTH, Unkeyable, is_plain, text
from langgraph_perf._id_names import named
from langgraph_perf._message_rows import DIGEST_SIZE
from langgraph_perf._messages_key import KeyEncoder, content_digest, forget

_root = lru_cache(256)(text)

__all__ = ["Unkeyable", "beginning", "digest", "forget", "message_digest"]


_BEGINNING = b"langgraph_perf key 1\0"


def beginning(root: str, value: Any) -> bytes:
    """What keys have in common whose first part is this one, which is plain data without ids."""
    return _BEGINNING + _root(root) + KeyEncoder().encode(value)


def digest(
    *parts: tuple[str, Any],
    code_of: Callable[[type], str] | None = None,
    begins: bytes = _BEGINNING,
) -> str:
    """The key of the given parts, as 40 hexadecimal digits.

    Args:
        parts: pairs of a name and a value. The name is part of the key, and the root of the path
            in an error: ``state["client"]``.
        code_of: says what there is to a class of the values besides its name.
        begins: the ``beginning`` with a part before these.

    Raises:
        Unkeyable: a part holds something that has no canonical value.
    """
    encoder = KeyEncoder()
    encoded = [begins]
    for root, value in parts:
        encoded.append(_root(root))
        try:
            raw = encoder.encode(value)
            encoded.append(raw)
            # most states are plain, with nothing in them that has an id
            if value is not None and not is_plain(raw) and (names := named(value, encoder.ids)):
                encoded.append(encoder.encode(names))
        except Unkeyable as exc:
            exc.within(root)
            raise
        except RecursionError as exc:
            raise Unkeyable(root, f"nested too deeply (accepted: {MAX_DEPTH} levels)") from exc
    if encoder.kinds and code_of is not None:
        encoded += map(text, sorted({code_of(kind) for kind in encoder.kinds}))
    return blake2b(b"".join(encoded), digest_size=DIGEST_SIZE).hexdigest()


def message_digest(message: BaseMessage) -> bytes:
    """The digest of what one message says (32 bytes), whatever its id and metadata.

    Raises:
        TypeError: not a message.
        Unkeyable: the message holds something that has no canonical value.
    """
    if not isinstance(message, BaseMessage):
        raise TypeError(f"message_digest() takes a BaseMessage, got a {type(message).__name__}")
    return content_digest(message)
