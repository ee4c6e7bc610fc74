"""Bytes to values: one loop over the records of a payload."""

from __future__ import annotations

import os
import struct
from typing import Any

from langchain_core.messages import BaseMessage
from ormsgpack import packb

from langgraph_perf import _codec_numpy, _codec_objects, _codec_values
from langgraph_perf._codec_allowlist import Allowlist, resolve
from langgraph_perf._codec_classes import Plan, plan_of
from langgraph_perf._codec_format import FORMAT, HEAD, MAX_DEPTH, DecodeError, Tag, damaged
from langgraph_perf._msgpack import unpackb

_RAW_READERS = {**_codec_values.RAW_READERS, **_codec_numpy.RAW_READERS}
_READERS = {**_codec_values.READERS, **_codec_numpy.READERS}
_TAKEN = object()
_END = os.urandom(16)
_PACKED_END = packb(_END)
_LONG = 1 << 13
"""From here on copying costs more than looking what it is."""
_PLAIN_HEAD = bytes((0x92, FORMAT))
_LONG_HEADS = {0xC5: (5, False), 0xC6: (7, False), 0xDA: (5, True), 0xDB: (7, True)}
"""msgpack's type byte to where the value begins, after its length, and whether it is a text."""


def decode_plain(payload: bytes | memoryview) -> Any:
    """The value of a payload without records."""
    if len(payload) > _LONG and payload[:2] == _PLAIN_HEAD and payload[2] in _LONG_HEADS:
        # nothing but bytes or a text: copied once, not three times
        start, is_text = _LONG_HEADS[payload[2]]
        if len(payload) - start != int.from_bytes(payload[3:start], "big"):
            damaged("is longer or shorter than its value")
        if is_text:
            return str(memoryview(payload)[start:], "utf-8")
        value = payload[start:]
        return value if type(value) is bytes else bytes(value)
    # unpackb ignores what follows a value. So here the payload is the first of two items and a
    # secret the second: whatever follows the value would be taken for the second item instead.
    pair, end = unpackb(b"".join((b"\x92", payload, _PACKED_END)))
    if end != _END:
        damaged("goes on after its value")
    return _root(pair)


def _root(pair: Any) -> Any:
    if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not int:
        damaged("is no payload of this library")
    if pair[0] != FORMAT:
        damaged(f"has format {pair[0]}, not {FORMAT}")
    return pair[1]


class Decoder:
    """Restores the value of one composed payload.

    Attributes:
        messages: the restored LangChain messages, inner ones first.
        abort: an interrupt that ormsgpack has turned into another error.
    """

    __slots__ = ("abort", "allowed", "depth", "depths", "messages", "objects", "plans")

    def __init__(self, allowed: Allowlist) -> None:
        self.allowed = allowed
        self.plans: dict[tuple[str, int, int], Plan] = {}
        self.objects: list[Any] = []
        self.depths: list[int] = []
        self.depth = 0
        self.messages: list[BaseMessage] = []
        self.abort: BaseException | None = None

    def decode(self, view: memoryview) -> Any:
        _, version, count = HEAD.unpack_from(view)
        if version != FORMAT:
            damaged(f"has format {version}, not {FORMAT}")
        sizes_at = HEAD.size + count
        position = sizes_at + 4 * count
        if position > len(view):
            damaged("is truncated")
        tags = view[HEAD.size : sizes_at]
        sizes = struct.unpack_from(f"<{count}I", view, sizes_at)
        if position + sum(sizes) != len(view):
            damaged("is truncated")
        if not count or tags[-1] != Tag.ROOT:
            damaged("has no value")
        for tag, size in zip(tags, sizes, strict=True):
            body = view[position : position + size]
            position += size
            self.depth = 0
            self.objects.append(self.restore(tag, body))
            if self.depth > MAX_DEPTH:
                damaged("nests too deep")
            self.depths.append(self.depth + 1)
        return self.objects[-1]

    def restore(self, tag: int, body: memoryview) -> Any:
        """What a record holds."""
        raw = _RAW_READERS.get(tag)
        if raw is not None:
            return raw(body)
        content = unpackb(body, ext_hook=self.part)
        if tag == Tag.ROOT:
            return _root(content)
        head, parts = content
        if type(parts) is not list:
            damaged("has a part of the wrong kind")
        read = _codec_objects.READERS.get(tag)
        if read is None:
            return _READERS[tag](head, parts)
        ref, shape = head[:2]
        plan = self.plans.get((ref, tag, shape)) or self.plan(ref, tag, shape)
        obj = read(plan, head, parts)
        if plan.message:
            self.messages.append(obj)
        return obj

    def part(self, code: int, data: bytes) -> Any:
        """The object that an extension value stands for."""
        try:
            index = int.from_bytes(data, "little")
            value = self.objects[index]
            if value is _TAKEN or code:
                damaged("refers to a part twice")
            self.objects[index] = _TAKEN
            if self.depths[index] > self.depth:
                self.depth = self.depths[index]
            return value
        except Exception:
            raise
        except BaseException as exc:
            self.abort = exc
            raise

    def plan(self, ref: Any, tag: int, shape: Any) -> Plan:
        """The plan of a class the payload names, if it may be restored and still looks alike."""
        if type(ref) is not str:
            damaged("has no class where one belongs")
        plan = plan_of(resolve(ref, self.allowed))
        if plan is None or plan.tag != tag:
            raise DecodeError(f"type {ref} is not of the kind that was stored")
        if plan.shape != shape:
            raise DecodeError(f"type {ref} has other fields now than when it was stored")
        self.plans[ref, tag, shape] = plan
        return plan
