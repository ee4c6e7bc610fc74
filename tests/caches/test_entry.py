"""Entries at rest: what was stored comes back exactly, and nothing else comes back at all."""

from __future__ import annotations

import os
import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_perf.caches.base import (
    DamagedEntry,
    Entry,
    Lookup,
    key_digest,
    pack,
    servable,
    tag_id,
    unpack,
)
from langgraph_perf.caches.entry import _LENGTH, _MAGIC, _META, _checksum, namespace_digest, seal

from .conftest import entry

KEY = (("graph", "node"), "key")
AES = EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32)
SERDES = [None, JsonPlusSerializer(pickle_fallback=False), AES]

texts = st.text(max_size=8)
keys = st.tuples(st.lists(texts, max_size=4).map(tuple), texts)
times = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
entries = st.builds(
    Entry,
    payload=st.binary(max_size=200),
    created=times,
    expires=st.none() | times,
    deps=st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
    seconds=times,
    tokens=st.integers(0, 2**60),
    grace=times,
)


def test_known_names():
    """What keys and tags are called in storage: BLAKE2b digests of 128 bits, the same for ever."""
    assert tag_id("docs") == blake2b(b"docs", digest_size=16).hexdigest()
    assert tag_id("docs") == "fc0003587136a64557864566da093929"
    graph, node, name = b"graph", b"node", blake2b(b"key", digest_size=16).hexdigest()
    parts = _LENGTH.pack(len(graph)) + graph + _LENGTH.pack(len(node)) + node
    namespace = blake2b(parts, digest_size=16, person=b"langgraph_perf").hexdigest()
    assert key_digest(KEY).hex() == namespace + name
    assert key_digest(KEY).hex() == (
        "a33238a39592e1a11222a813b736b2c882af27c64245bfd15a520134b44e6bb1"
    )


@pytest.mark.parametrize("serde", SERDES)
@given(key=keys, stored=entries)
def test_round_trip(serde, key, stored):
    """``unpack`` undoes ``pack``, with and without a serde."""
    assert unpack(key, pack(key, stored, serde), serde) == stored


@pytest.mark.parametrize("serde", SERDES)
def test_every_changed_byte_is_noticed(serde):
    """Flipping any bit, cutting anywhere or appending makes it a damaged entry."""
    blob = pack(KEY, entry(os.urandom(40), deps=(("a", "b"),)), serde)
    for i in range(len(blob)):
        for bit in (1, 128):
            with pytest.raises(DamagedEntry):
                unpack(KEY, blob[:i] + bytes([blob[i] ^ bit]) + blob[i + 1 :], serde)
        with pytest.raises(DamagedEntry):
            unpack(KEY, blob[:i], serde)
    with pytest.raises(DamagedEntry):
        unpack(KEY, blob + b"\0", serde)


@pytest.mark.parametrize("serde", SERDES)
@given(key=keys, other=keys, stored=entries)
def test_belongs_to_its_key(serde, key, other, stored):
    """Bytes found under another key are foreign."""
    if key != other:
        with pytest.raises(DamagedEntry):
            unpack(other, pack(key, stored, serde), serde)


@pytest.mark.parametrize("blob", [None, "text", 1, b"", b"\0" * 100, _MAGIC, bytearray(200)])
def test_what_is_not_an_entry(blob):
    """Anything else is a damaged entry, never another error."""
    with pytest.raises(DamagedEntry):
        unpack(KEY, blob)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_forged_checksum(meta, body):
    """Bytes with a right checksum but any content are damaged or an entry, never another error."""
    checksum = _checksum(key_digest(KEY), meta, body)
    head = _MAGIC + checksum + meta
    try:
        found = unpack(KEY, struct.pack("<I", len(head)) + head + body)
    except DamagedEntry:
        return
    assert type(found) is Entry


def test_serde_covers_every_byte():
    """With encryption neither payload nor tags, times or namespaces can be seen at rest."""
    stored = entry(b"the payload", deps=((tag_id("user:42"), "f00dfeedf00dfeed"),), seconds=1234.5)
    blob = pack(KEY, stored, AES)
    for secret in (
        b"the payload",
        tag_id("user:42").encode(),
        b"f00dfeed",
        struct.pack(">d", 1234.5),
        struct.pack(">d", stored.created),
        b"graph",
    ):
        assert secret not in blob
        assert secret == b"graph" or secret in pack(KEY, stored)


def test_encrypted_and_plain_do_not_mix():
    """A plain entry, or one of another secret, is damaged where encryption is expected."""
    other = EncryptedSerializer.from_pycryptodome_aes(key=b"o" * 32)
    plain_serde = JsonPlusSerializer(pickle_fallback=False)
    for written, read in [(None, AES), (plain_serde, AES), (other, AES), (AES, None)]:
        with pytest.raises(DamagedEntry):
            unpack(KEY, pack(KEY, entry(), written), read)


def test_ciphertext_cannot_be_moved():
    """Whoever can write but not decrypt cannot put a value under another key."""
    other = (("graph", "node"), "other")
    blob = pack(KEY, entry(), AES)
    (size,) = _LENGTH.unpack_from(blob)
    meta, body = blob[_LENGTH.size + _META : _LENGTH.size + size], blob[_LENGTH.size + size :]
    head = _MAGIC + _checksum(key_digest(other), meta, body) + meta
    with pytest.raises(DamagedEntry, match="another key"):
        unpack(other, struct.pack("<I", len(head)) + head + body, AES)


def test_payload_is_not_copied():
    """The body of a large entry is the payload object itself."""
    stored = entry(os.urandom(2**20))
    assert seal(key_digest(KEY), stored)[1] is stored.payload


@given(st.lists(st.lists(texts, max_size=4).map(tuple), max_size=10))
def test_namespace_digests_are_injective(namespaces):
    """Parts do not run into each other."""
    assert len({namespace_digest(n) for n in namespaces}) == len(set(namespaces))


@pytest.mark.parametrize(
    ("fields", "lookup", "now", "served"),
    [
        ({}, {}, 1e12, True),
        ({"expires": 10.0}, {}, 9.9, True),
        ({"expires": 10.0}, {}, 10.0, False),
        ({}, {"max_age": 5}, 4.9, True),
        ({}, {"max_age": 5}, 5.0, False),
        ({"deps": (("a", "1"),)}, {}, 0.0, True),
        ({"deps": (("a", "2"),)}, {}, 0.0, False),
        ({"deps": (("unknown", "1"),)}, {}, 0.0, False),
        ({"deps": (("a", "1"), ("b", "9"))}, {}, 0.0, False),
        ({"deps": (("a", "1"), ("b", "2"))}, {"tags": ("b",)}, 0.0, True),
        ({"deps": (("a", "1"),)}, {"tags": ("b",)}, 0.0, False),
        ({}, {"tags": ("b",)}, 0.0, False),
    ],
)
def test_servable(fields, lookup, now, served):
    """An entry is served while it is young enough and all its tokens are current."""
    stored = Entry(b"", 0.0, **fields)
    assert servable(stored, Lookup(KEY, **lookup), {"a": "1", "b": "2"}, now) is served
