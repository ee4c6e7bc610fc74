"""What a checkpointer's serde hides at rest, it hides in the cache as well."""

from __future__ import annotations

from typing import Any

import ormsgpack
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_perf._msgpack import unpackb
from langgraph_perf.caches.base import Cache
from langgraph_perf.codec import DecodeError, EncodeError


class Seal:
    """Wraps payloads with a serde, each for one key.

    Args:
        serde: turns bytes into other bytes and back, such as LangGraph's ``EncryptedSerializer``.
    """

    def __init__(self, serde: SerializerProtocol) -> None:
        self.serde = serde

    @staticmethod
    def of(serde: Any, cache: Cache) -> Seal | None:
        """The seal for what ``cache`` keeps; ``None`` where ``serde`` would change nothing, or
        the cache was given one of its own for wherever that is."""
        if serde is None or type(serde) is JsonPlusSerializer:
            return None  # which leaves bytes as they are
        tiers: tuple[Cache, ...] = getattr(cache, "tiers", (cache,))
        # memory in front of them is not at rest, and with a serde of its own it hides nothing there
        outside = [tier for tier in tiers if tier.blocking] or tiers
        if all(tier.value_serde is not None for tier in outside):
            return None
        return Seal(serde)

    def closed(self, name: str, payload: bytes) -> bytes:
        """``payload``, sealed for the key ``name``.

        Raises:
            EncodeError: the serde failed.
        """
        try:
            # the name inside, so that it cannot be put under another key
            return ormsgpack.packb(self.serde.dumps_typed(ormsgpack.packb((name, payload))))
        except Exception as exc:
            raise EncodeError(f"the checkpointer's serde failed: {exc!r}") from exc

    def opened(self, name: str, sealed: bytes) -> bytes:
        """The payload that was sealed for the key ``name``.

        Raises:
            DecodeError: ``sealed`` is nothing that this serde made for this key.
        """
        try:
            kind, body = unpackb(sealed)
            if isinstance(self.serde, EncryptedSerializer) and "+" not in kind:
                # it would pass plaintext through, which anybody could have put there
                raise ValueError("not encrypted")
            written, payload = unpackb(self.serde.loads_typed((kind, body)))
            if written != name or type(payload) is not bytes:
                raise ValueError("sealed for another key")
        except Exception as exc:
            raise DecodeError(f"the checkpointer's serde: {exc!r}") from exc
        return payload
