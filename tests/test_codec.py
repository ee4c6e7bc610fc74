"""The codec: exact round trips, errors that name the path, and safety on hostile bytes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import gc
import importlib.util
import ipaddress
import math
import pathlib
import re
import struct
import subprocess
import sys
import threading
import types
import typing
import uuid
import warnings
import zoneinfo
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypeVar

import numpy as np
import ormsgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core import messages as lc
from langchain_core.documents import Document
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.store.base import Item
from langgraph.types import Command, Interrupt, Overwrite, Send, StateSnapshot
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from typing_extensions import NotRequired, TypedDict

from langgraph_perf import _codec_decode, _codec_encode, _codec_values
from langgraph_perf._codec_encode import Encoder, Walker
from langgraph_perf._codec_format import FORMAT, Tag
from langgraph_perf._msgpack import checked_unpackb, require_honest
from langgraph_perf.codec import Allowlist, DecodeError, EncodeError, decode, encode, types_in

T = TypeVar("T")
calls: list[str] = []
"""What the hooks of the classes below append to when anything calls them."""


@pytest.fixture(autouse=True)
def _no_calls_left():
    calls.clear()


class Color(enum.Enum):
    RED = 1
    CRIMSON = 1
    GREEN = "g"


class Level(enum.IntEnum):
    LOW = 1


class Mode(str, enum.Enum):
    FAST = "fast"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: Any = None


OldPoint = collections.namedtuple("OldPoint", "x y")


@dataclasses.dataclass
class Plain:
    a: int
    b: list[Any] = dataclasses.field(default_factory=list)
    later: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        calls.append("post_init")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: int


@dataclasses.dataclass
class Child(Plain):
    c: int = 3


@dataclasses.dataclass
class Boxed(dict):  # its state is not all in __dict__
    a: int = 1


class Model(BaseModel):
    a: int
    b: list[Any] = Field(default_factory=list)
    _secret: str = PrivateAttr("s")

    @field_validator("a")
    @classmethod
    def _check(cls, value: int) -> int:
        calls.append("validator")
        return value

    def model_post_init(self, context: Any) -> None:
        calls.append("post_init")

    def __setstate__(self, state: Any) -> None:
        calls.append("setstate")
        super().__setstate__(state)

    def __reduce__(self) -> Any:
        calls.append("reduce")
        return super().__reduce__()


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    a: int = 1


class Box(BaseModel, Generic[T]):
    item: T


IntBox = Box[int]
PointBox = Box[Point]


class Outer(BaseModel):
    class Inner(BaseModel):
        n: int = 0

    inner: Inner = Field(default_factory=Inner)


class FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True)

    a: int = 1


class Client:
    """Something that cannot be stored."""


class Text(str):
    pass


class Number(int):
    pass


class Bag(dict):
    pass


class Row(list):
    pass


class Pair(tuple):
    pass


def same(left: Any, right: Any) -> bool:
    """Equal and of the same type at every level; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, dict):
        default = getattr(left, "default_factory", None) is getattr(right, "default_factory", None)
        pairs = zip(left.items(), right.items(), strict=False)
        return default and len(left) == len(right) and all(same(*pair) for pair in pairs)
    if isinstance(left, (list, tuple, collections.deque)):
        length = len(left) == len(right)
        maxlen = getattr(left, "maxlen", None) == getattr(right, "maxlen", None)
        return maxlen and length and all(map(same, left, right))
    if isinstance(left, (set, frozenset)):
        return left == right and {(type(x), x) for x in left} == {(type(x), x) for x in right}
    if isinstance(left, np.ndarray):
        if left.dtype == object:
            return left.shape == right.shape and same(left.tolist(), right.tolist())
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.flags.f_contiguous == right.flags.f_contiguous
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, np.generic):
        # a long double has padding of any content
        bytewise = left.dtype.char != "g"
        return left.dtype == right.dtype and bool(
            left.tobytes() == right.tobytes() if bytewise else left == right
        )
    if isinstance(left, BaseModel):
        return (
            same(left.__dict__, right.__dict__)
            and left.__pydantic_fields_set__ == right.__pydantic_fields_set__
            and same(left.__pydantic_extra__, right.__pydantic_extra__)
            and same(left.__pydantic_private__, right.__pydantic_private__)
        )
    if isinstance(left, dt.datetime | dt.time):
        return left == right and left.fold == right.fold and same(left.tzinfo, right.tzinfo)
    if isinstance(left, Send):
        return all(same(getattr(left, n), getattr(right, n)) for n in ("node", "arg", "timeout"))
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left)]
        gone = object()
        return all(
            (getattr(left, n, gone) is gone and getattr(right, n, gone) is gone)
            or same(getattr(left, n), getattr(right, n))
            for n in names
        )
    return bool(left == right)


def roundtrip(value: Any, allowed: Allowlist | None = None) -> Any:
    return decode(encode(value), allowed)


nested: list[Any] = []
for _ in range(100):
    nested = [nested]

PLAIN = [
    None,
    True,
    False,
    0,
    -1,
    2**63,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**400,
    -(10**400),
    1 << 2000,
    0.0,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1j,
    complex(-0.0, math.nan),
    "",
    "text",
    "żółć 🦜",
    "\ud800",
    "a\udfffb",
    "\x00",
    b"",
    b"\xff\x00",
    bytearray(b"\x01\x02"),
    [],
    [1, [2, [3]]],
    (),
    (1,),
    ((), [()]),
    {},
    {"a": {"b": None}},
    {"": 0, "ż": 1},
    {1: "int", "1": "str"},
    {True: 1, "True": 2},
    {1.0: "float"},
    {None: 1, (1, "a"): 2, b"k": 3},
    {"\udc00": 1},
    {frozenset([1]): 1},
    {2**70: 1},
    {0: {0: {0: bytearray(b"x")}}},
    {"b": 1, "a": 2},
    set(),
    {1, "a", None},
    frozenset(),
    frozenset({(1, 2), b"x"}),
    {1.0, "1"},
    {frozenset({frozenset({1})})},
    nested,
    [bytearray(b""), b""],
    {"deep": [{"x": bytearray(b"1")}]},
    [0.5] * 70 + [bytearray(b"x")] + [0.5],
    "x" * 100_000,
    list(range(3000)),
    "ą" * 5000,
]

STDLIB = [
    collections.deque([1, 2], 5),
    collections.deque(),
    collections.deque([(1,)], 0),
    collections.OrderedDict([("b", 1), ("a", 2)]),
    collections.OrderedDict({1: 2}),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {(1,): 1}),
    collections.defaultdict(int),
    collections.Counter("hello"),
    collections.Counter({"a": -1}),
    Point(1, [2]),
    OldPoint(1, (2,)),
    Color.RED,
    Color.CRIMSON,
    Color.GREEN,
    Level.LOW,
    Mode.FAST,
    Right.READ,
    Right.READ | Right.WRITE,
    Right(0),
    Bits.A | Bits.B,
    Bits(0),
    {Mode.FAST: 1, Color.RED: 2, Level.LOW: 3},
    {Frozen(1): 2},
    {Point(1, 2)},
    dt.datetime(2024, 2, 29, 1, 2, 3, 4),
    dt.datetime.min,
    dt.datetime.max,
    dt.date(2024, 1, 1),
    dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc),
    dt.time(1, 2, 3, 4, fold=1),
    dt.time(1, tzinfo=dt.timezone(dt.timedelta(hours=-3), "X")),
    dt.timedelta(-1, 2, 3),
    dt.timedelta.max,
    dt.timezone.utc,
    dt.timezone(dt.timedelta(seconds=1)),
    zoneinfo.ZoneInfo("UTC"),
    uuid.UUID(int=5),
    uuid.UUID("99d40eba-e6c1-11f1-b5a7-0242ac120002"),
    decimal.Decimal("1.10"),
    decimal.Decimal("-0"),
    decimal.Decimal("1E+999999"),
    fractions.Fraction(-2, 3),
    fractions.Fraction(10**50, 7),
    pathlib.Path("/a/b c"),
    pathlib.PurePosixPath("x/\udcff"),
    pathlib.PureWindowsPath("C:\\x"),
    pathlib.Path(),
    range(5),
    range(10, 0, -3),
    range(10**30),
    re.compile("a(?P<x>b)", re.I | re.M),
    re.compile(b"\\w", re.A),
    ipaddress.ip_address("1.2.3.4"),
    ipaddress.ip_address("fe80::1%eth0"),
    ipaddress.ip_network("10.0.0.0/8"),
    ipaddress.ip_network("2001:db8::/32"),
    ipaddress.ip_interface("1.2.3.4/24"),
    ipaddress.ip_interface("::1/128"),
]


def ident(value: Any) -> str:
    if isinstance(value, set | frozenset):
        return type(value).__name__  # its order, and so its text, is another in each process
    return f"{type(value).__name__}-{str(value)[:20]!a}"


@pytest.mark.parametrize("value", PLAIN + STDLIB, ids=ident)
def test_standard_values_come_back_exactly(value):
    """Every standard library value comes back equal and of the same type, alone and nested."""
    assert same(roundtrip(value), value)
    assert same(roundtrip({"k": [(value,)]}), {"k": [(value,)]})


@pytest.mark.parametrize("text", ["NaN", "-NaN123", "sNaN", "sNaN7", "Infinity", "-Infinity"])
def test_special_decimals_come_back_exactly(text):
    """Decimal's special values keep sign, kind and diagnostic digits."""
    assert str(roundtrip(decimal.Decimal(text))) == text


def test_nan_keeps_its_bits():
    """A NaN comes back with the sign and payload it had."""
    (nan,) = struct.unpack("<d", bytes.fromhex("0123456789abf8ff"))
    assert struct.pack("<d", roundtrip([nan])[0]) == bytes.fromhex("0123456789abf8ff")


def test_equal_keys_of_different_types_stay_apart():
    """1, True and 1.0 as keys keep their own type, and order is that of insertion."""
    for key in (1, True, 1.0, "1", b"1", (1,), None, Color.RED):
        value = {"z": 0, key: 1, "a": 2}
        assert [(type(k), k) for k in roundtrip(value)] == [(type(k), k) for k in value]


def numpy_values() -> list[Any]:
    base = np.arange(24).reshape(2, 3, 4)
    struct_type = np.dtype([("a", "<i4"), ("b", ">f8", (2, 2)), ("t", "M8[ns]"), ("u", "U5")])
    spread = np.dtype(
        {
            "names": ["x", "y"],
            "formats": ["u1", "<f4"],
            "offsets": [3, 8],
            "titles": ["the x", None],
            "itemsize": 20,
        }
    )
    values: list[Any] = [
        base,
        base.T,
        np.asfortranarray(base),
        base[:, ::2],
        base[::-1],
        base[:0],
        np.array(5),
        np.array("x"),
        np.array(b"x\0y"),
        np.array(["ab", ""]),
        np.zeros((0, 5)),
        np.array([1, 2], dtype=">i4"),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.array(["2020-01-01", "NaT"], dtype="M8[D]"),
        np.array([1, 2], dtype="m8[25s]"),
        np.zeros(3, struct_type),
        np.zeros(2, spread),
        np.zeros(2, np.dtype("i1,f8", align=True)),
        np.array([b"ab"], dtype="V2"),
        np.array([1.5], dtype=np.float16),
        np.ones(3, np.longdouble),
        np.array([1, 2], dtype=np.longlong),
        np.array([math.nan, -0.0]),
        np.array([1, "a", None, [1], (2,)], dtype=object),
        np.array([[1, 2], ["x", (3,)]], dtype=object, order="F"),
        np.array({"a": 1}, dtype=object),
        np.float64(1.5),
        np.float32(-0.0),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1j),
        np.datetime64("2020-01-01T00:00", "ns"),
        np.timedelta64(3, "h"),
        np.datetime64("NaT", "s"),
        np.str_("a\0"),
        np.str_(""),
        np.bytes_(b"a\0"),
        np.void(b"abc"),
        np.float16(2),
        np.longdouble(1) / 3,
        np.longlong(4),
        np.zeros(1, struct_type)[0],
        {np.int64(1): np.float64(2), np.str_("k"): 3},
    ]
    return values


@pytest.mark.parametrize("value", numpy_values(), ids=ident)
def test_numpy_comes_back_exactly(value):
    """Arrays and scalars keep dtype, byte order, shape, memory order and content."""
    assert same(roundtrip({"a": value})["a"], value)


def test_arrays_come_back_writable():
    """A node may write into an array it got from the cache without touching the cache."""
    payload = encode(np.zeros(3))
    decode(payload)[:] = 1
    assert decode(payload).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "value",
    [
        np.ma.masked_array([1], [True]),
        np.array([(1, None)], dtype=[("a", "i4"), ("b", object)]),
        np.zeros(3, np.dtype([])),
        np.zeros(2, np.dtype("i4", metadata={"a": 1})),
        np.zeros(2, dtype=[("a", "i4")]).view(np.recarray),
        np.array([Client()], dtype=object),
    ],
    ids=ident,
)
def test_other_arrays_are_refused(value):
    """An array that could only come back as something else is refused."""
    with pytest.raises(EncodeError):
        encode(value)


def test_dataclasses_come_back_without_running_their_code():
    """Dataclasses keep all fields, missing and ad-hoc attributes too, and run no code."""
    plain = Plain(1, [Slotted(2, (3,)), Frozen(4)])
    child = Child(1)
    child.later = "set"
    child.extra = {"not": "a field"}
    calls.clear()
    back, again = roundtrip([plain, child])
    assert calls == []
    assert same([back, again], [plain, child])
    assert not hasattr(back, "later")
    assert again.__dict__ == child.__dict__
    assert back.b is not plain.b


def test_models_come_back_without_running_their_code():
    """Models keep fields, fields set, extra and private attributes, and run no code of theirs."""
    model = Model(a=1)
    model._secret = "other"
    model.__dict__["a"] = "no int any more"  # a validator would reject it
    values = [
        model,
        Open(b=(1,), c="x"),
        Open(),
        IntBox(item=1),
        PointBox(item=Point(1, 2)),
        Outer(inner=Outer.Inner(n=2)),
        FrozenModel(),
        Model.model_construct(b=[]),
    ]
    calls.clear()
    back = roundtrip(values)
    assert calls == []
    assert same(back, values)
    assert [b.model_fields_set for b in back] == [v.model_fields_set for v in values]
    assert back[0]._secret == "other"
    assert back[1].model_extra == {"b": (1,), "c": "x"}
    assert type(back[4]) is PointBox


def test_a_combined_flag_that_this_process_has_not_met_comes_back():
    """A combination of flags comes back in a process that never combined them, by no user code."""

    class Fresh(enum.Flag):
        A = 1
        B = 2

    class FreshInt(enum.IntFlag):
        A = 1

    for value in (Fresh.A | Fresh.B, Fresh(0), FreshInt(5)):
        payload = encode([value])
        type(value)._value2member_map_.pop(value._value_)
        (back,) = decode(payload)
        assert type(back) is type(value)
        assert back._value_ == value._value_


def test_a_slot_that_was_never_assigned_stays_so():
    """Slots without a value come back without one."""
    half = object.__new__(Slotted)
    object.__setattr__(half, "a", 1)
    back = roundtrip(half)
    assert back.a == 1
    assert not hasattr(back, "b")


def test_v1_models_come_back():
    """Models of pydantic's v1 interface come back with fields set and private attributes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pydantic import v1

    class Old(v1.BaseModel):
        a: int = 1
        b: Any = None
        _hidden: int = v1.PrivateAttr(1)

    old = Old(b=(1,))
    old._hidden = 2
    back = roundtrip(old)
    assert type(back) is Old
    assert back == old
    assert back.__fields_set__ == {"b"}
    assert back._hidden == 2


MESSAGES = [
    lc.HumanMessage("hi", id="1", name="bob"),
    lc.SystemMessage(content=[{"type": "text", "text": "x"}]),
    lc.AIMessage(
        "a",
        id="run-1",
        tool_calls=[{"name": "f", "args": {"x": (1,)}, "id": "call_1"}],
        usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        response_metadata={"when": dt.datetime(2024, 1, 1)},
        custom="extra",
    ),
    lc.AIMessage("", invalid_tool_calls=[{"name": None, "args": "{", "id": None, "error": "e"}]),
    lc.AIMessageChunk(
        "a",
        id="c",
        tool_call_chunks=[{"name": "f", "args": "{}", "id": "1", "index": 0}],
        chunk_position="last",
    ),
    lc.HumanMessageChunk("x"),
    lc.SystemMessageChunk("x"),
    lc.ChatMessage("x", role="r"),
    lc.ChatMessageChunk("x", role="r"),
    lc.FunctionMessage("x", name="f"),
    lc.FunctionMessageChunk("x", name="f"),
    lc.ToolMessage("x", tool_call_id="1", artifact=(1, b"x")),
    lc.ToolMessageChunk("x", tool_call_id="1", status="error"),
    lc.RemoveMessage(id="1"),
    lc.RemoveMessage(id=REMOVE_ALL_MESSAGES),
    Document("text", id="d", metadata={"k": {1, 2}}),
]
LANGGRAPH = [
    Command(update={"messages": MESSAGES[:3]}, goto="next"),
    Command(resume={"i": (1,)}),
    Command(graph=Command.PARENT, goto=[Send("a", {"x": MESSAGES[0]}), "b"], update=[("k", 1)]),
    Command(goto=Send("a", Plain(1), timeout=3)),
    Command(),
    Send("n", None),
    Overwrite([1]),
    [Command(update={"a": 1}), {"a": 2}, Command(goto="x")],
    Interrupt("v", id="i"),
    Overwrite({"a": (1,)}),
]


@pytest.mark.parametrize("value", MESSAGES + LANGGRAPH, ids=ident)
def test_messages_and_commands_come_back_exactly(value):
    """Messages of every kind and LangGraph's own types come back equal and of the same type."""
    for strict in (False, True):
        allowed = Allowlist.of(Plain, strict=strict)
        assert same(roundtrip({"k": [value]}, allowed), {"k": [value]})


def test_store_items_come_back():
    """Items of a LangGraph store come back."""
    now = dt.datetime.now(dt.timezone.utc)
    item = Item(value={"a": 1}, key="k", namespace=("a", "b"), created_at=now, updated_at=now)
    assert roundtrip(item) == item


def test_text_of_a_message_comes_back_as_such():
    """``message.text``, a str subclass that nodes often return, keeps its type."""
    text = lc.AIMessage("hello").text
    assert same(roundtrip({"answer": text}), {"answer": text})


def test_messages_are_listed_in_the_same_order_both_ways():
    """``messages`` lists those of the value, inner ones first, on both sides."""
    inner = lc.HumanMessage("inner")
    value = {
        "a": [lc.AIMessage("1"), lc.ToolMessage("2", tool_call_id="x", artifact=[inner])],
        "b": Command(update={"m": lc.AIMessage("3")}, goto=[Send("n", [lc.AIMessage("4")])]),
    }
    for variant in (value, {**value, 1: "forces the slow way"}):
        seen: list[Any] = []
        back: list[Any] = []
        decode(encode(variant, messages=seen), messages=back)
        assert sorted(m.content for m in seen) == ["1", "2", "3", "4", "inner"]
        assert [m.content for m in seen[:3]] == ["1", "inner", "2"]
        assert back == seen
        assert seen[1] is inner
        assert back[1] is not inner


def test_messages_is_emptied_when_there_are_none():
    """A list from an earlier call never survives into the answer of the next."""
    seen: list[Any] = [1]
    decode(encode({"a": 1}, messages=seen), messages=seen)
    assert seen == []


# -- refusals -------------------------------------------------------------------------------------


def generator():
    yield 1


REFUSED = {
    "client": (Client(), "Client"),
    "function": (ident, "function"),
    "lock": (threading.Lock(), "lock"),
    "generator": (generator(), "generator"),
    "class": (Plain, "type"),
    "module": (math, "module"),
    "memoryview": (memoryview(b"x"), "memoryview"),
    "str subclass": (Text("x"), "Text"),
    "int subclass": (Number(1), "Number"),
    "dict subclass": (Bag(a=1), "Bag"),
    "object": (object(), "object"),
    "list subclass": (Row([1]), "Row"),
    "tuple subclass": (Pair([1]), "Pair"),
    "error": (ValueError(), "ValueError"),
    "dict dataclass": (Boxed(), "Boxed"),
    "lambda factory": (collections.defaultdict(lambda: 1), "factory"),
    "class factory": (collections.defaultdict(Client), "factory"),
    "ext": (ormsgpack.Ext(1, b"\xc4"), "Ext"),
    "zone": (dt.datetime(2024, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()), "Zone"),
}


@pytest.mark.parametrize(("value", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_come_back_is_refused_with_its_path(value, named):
    """Anything else is an EncodeError that names path and type, never its neighbouring type."""
    for wrap, path in (
        (lambda v: v, "result"),
        (lambda v: {"a": 1, "client": v}, 'result["client"]'),
        (lambda v: [0, (1, {"k": v})], 'result[1][1]["k"]'),
        (lambda v: Plain(1, [v]), "result.b[0]"),
        (lambda v: {1: v}, "result[1]"),
        (lambda v: [lc.ToolMessage("x", tool_call_id="1", artifact=v)], "result[0].artifact"),
        (lambda v: Command(update={"x": v}), 'result.update["x"]'),
    ):
        with pytest.raises(EncodeError) as caught:
            encode(wrap(value))
        assert caught.value.path.replace("'", '"').startswith(path)
        assert named in caught.value.reason
        assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 8, 16, 17, 300, 70_000])
def test_an_ext_is_refused_whatever_its_size(size):
    """An ormsgpack.Ext of any code and size is refused, also where it could pass for a part."""
    for code in (0, 1, 127):
        ext = ormsgpack.Ext(code, bytes(size))
        for value in (ext, {"a": [ext]}, [(1,), ext], Plain(1, [(2,), ext, (3,)])):
            with pytest.raises(EncodeError, match=r"Ext cannot be stored"):
                encode(value)


@pytest.mark.parametrize("letter", "ĀŠƀǅȀɐԀՀրאط")
def test_text_that_looks_like_an_ext_is_stored(letter):
    """Letters whose UTF-8 begins like a binary or an extension value are text like any other."""
    for value in ({"a": [letter, (letter,)]}, Plain(1, [letter]), [(i,) for i in range(0xD9)]):
        assert same(roundtrip(value), value)


def test_a_bad_key_is_refused_with_its_path():
    """A key that cannot be stored is named as a key."""
    with pytest.raises(EncodeError, match=r"result\[0\] key \[<Client>\]"):
        encode([{Client(): 1}])


class Guessing(enum.IntFlag):
    A = 1

    @classmethod
    def _missing_(cls, value: Any) -> Any:
        calls.append("missing")
        return super()._missing_(value)


class WithSlot(BaseModel):
    __slots__ = ("more",)


def odd_values() -> list[Any]:
    ordered = collections.OrderedDict(a=1)
    ordered.note = "x"
    named = type("Sub", (Point,), {})(1)
    named.note = "x"
    model = Open()
    model.__dict__[1] = 2
    guess = Guessing(3)
    Guessing._value2member_map_.pop(3, None)
    with contextlib.closing(open(tz_file(), "rb")) as file:
        keyless = zoneinfo.ZoneInfo.from_file(file)
    return [
        ordered,
        named,
        model,
        guess,
        WithSlot(),
        keyless,
        Open.model_construct({"\udc00"}),
        object.__new__(Color),
    ]


def tz_file() -> str:
    return next(
        str(path) for root in zoneinfo.TZPATH if (path := pathlib.Path(root, "UTC")).is_file()
    )


@pytest.mark.parametrize("index", range(8))
def test_state_that_would_be_lost_is_refused(index):
    """An object with more to it than the codec stores is refused instead of trimmed."""
    value = odd_values()[index]
    calls.clear()
    with pytest.raises(EncodeError):
        encode({"x": value})
    assert calls == []


def test_debug_patterns_are_refused():
    """A pattern compiled with re.DEBUG, which prints, is refused."""
    pattern = types.SimpleNamespace(pattern="a", flags=re.DEBUG)
    with pytest.raises(EncodeError, match="DEBUG"):
        _codec_values._write_pattern(pattern)


def test_a_cycle_is_refused():
    """A value that contains itself, through any container, is an EncodeError."""
    items: list[Any] = []
    items.append(items)
    mapping: dict[Any, Any] = {}
    mapping["self"] = mapping
    record = Plain(1)
    record.b.append((record,))
    model = Open(a=1)
    model.__dict__["a"] = [model]
    keyed: dict[Any, Any] = {1: 2}
    keyed[2] = keyed
    for value in (items, mapping, record, model, keyed):
        with pytest.raises(EncodeError, match="contains itself"):
            encode(value)


@pytest.mark.parametrize("depth", [300, 3000, 100_000])
def test_too_deep_is_refused(depth):
    """Nesting without end is an EncodeError, not a RecursionError or a crash."""
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}, Slotted):
        value: Any = None
        for _ in range(depth):
            value = wrap(value)
        with pytest.raises(EncodeError, match="nests deeper"):
            encode(value)
        while value:  # unwound by hand: freeing a long chain of slotted objects recurses
            value = value.a if type(value) is Slotted else next(iter(value), None)
            value = None if type(value) in (str, int) else value


def test_deep_values_within_the_limit_come_back():
    """Dozens of levels of objects, lists and dicts are fine."""
    value: Any = "end"
    for i in range(60):
        value = [(value,), {i: value} if i % 20 == 0 else None]
    assert same(roundtrip(value), value)


def test_reading_an_object_may_fail():
    """An object whose state cannot be read is an EncodeError, whatever it raises."""
    broken = object.__new__(Model)
    with pytest.raises(EncodeError, match="could not be read"):
        encode({"m": broken})


def test_an_interrupt_gets_through():
    """KeyboardInterrupt during encoding is not turned into a refusal."""

    class Stop(dict):
        pass

    def interrupt(obj: Any) -> Any:
        raise KeyboardInterrupt

    _codec_encode._known()[Stop] = interrupt, False
    try:
        with pytest.raises(KeyboardInterrupt):
            encode([Stop()])
    finally:
        del _codec_encode._known()[Stop]


def test_an_interrupt_of_decoding_gets_through(monkeypatch):
    """KeyboardInterrupt while a part is fetched is not turned into a miss."""

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    payload = encode([(1,)])
    monkeypatch.setattr(
        _codec_decode, "int", types.SimpleNamespace(from_bytes=interrupt), raising=False
    )
    with pytest.raises(KeyboardInterrupt):
        decode(payload)


def test_the_value_is_left_alone():
    """Encoding changes nothing in the value, and what comes back shares nothing with it."""
    value = {"m": [lc.AIMessage("a", id="1")], 1: [bytearray(b"x")], "d": Plain(1, [2])}
    before = decode(encode(value))
    first, second = decode(encode(value)), decode(encode(value))
    first["m"][0].content = first["d"].b = first[1][0][0] = 0
    assert same(value, before)
    assert same(second, before)


# -- which types come back ------------------------------------------------------------------------


def test_strict_mode_restores_only_what_is_allowed(monkeypatch):
    """Strict, by argument or environment, a type comes back only if it was allowed."""
    values = [Plain(1), Model(a=1), Color.RED, Point(1, 2), IntBox(item=1), Right.READ]
    monkeypatch.delenv("LANGGRAPH_STRICT_MSGPACK", raising=False)
    for value in values:
        payload = encode([value])
        assert same(decode(payload), [value])
        for flag in ("1", "true", "YES"):
            monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", flag)
            with pytest.raises(DecodeError, match=r"allow it with Allowlist.*leave strict mode"):
                decode(payload)
            assert same(decode(payload, Allowlist(strict=False)), [value])
            assert same(decode(payload, Allowlist.of(type(value))), [value])
        monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", "no")
        with pytest.raises(DecodeError, match=type(value).__name__.split("[")[0]):
            decode(payload, Allowlist(strict=True))


def test_an_allowed_generic_model_allows_its_parametrizations():
    """Box allows Box[int]; Box[int] allows neither Box nor Box[Point]."""
    allowed = Allowlist.of(Box, strict=True)
    assert same(roundtrip(IntBox(item=1), allowed), IntBox(item=1))
    narrow = Allowlist.of(IntBox, strict=True)
    assert same(roundtrip(IntBox(item=1), narrow), IntBox(item=1))
    with pytest.raises(DecodeError):
        roundtrip(Box(item=1), narrow)
    with pytest.raises(DecodeError):
        roundtrip(PointBox(item=Point(1)), narrow)


def test_an_allowlist_is_immutable_and_extends():
    """extended() gives a new allowlist; the old one and its mode stay as they are."""
    first = Allowlist.of(Plain, strict=True)
    second = first.extended(Color)
    assert first.types == {Plain}
    assert second.types == {Plain, Color}
    assert second.strict is True
    assert second == Allowlist.of(Color, Plain, strict=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.strict = False
    with pytest.raises(TypeError, match="Allowlist takes classes, got 'Plain'"):
        Allowlist.of("Plain")


def test_two_allowed_classes_of_one_name_are_never_mixed_up():
    """When two listed classes share a name, neither is restored under it."""

    def make():
        @dataclasses.dataclass
        class Local:
            a: int

        return Local

    one, two = make(), make()
    payload = encode(one(1))
    with pytest.raises(DecodeError):
        decode(payload, Allowlist.of(one, two, strict=True))
    assert decode(payload, Allowlist.of(one, strict=True)) == one(1)


def test_local_classes_come_back_in_the_process_that_encoded_them():
    """A class defined in a function works here, and is a clear refusal elsewhere."""

    @dataclasses.dataclass
    class Local:
        a: int

    class LocalModel(BaseModel):
        a: Local

    value = [Local(1), LocalModel(a=Local(2))]
    payload = encode(value)
    assert decode(payload) == value
    code = (
        "import sys\nfrom langgraph_perf.codec import DecodeError, decode\n"
        "try: decode(sys.stdin.buffer.read())\nexcept DecodeError as exc: print(exc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=payload, capture_output=True, check=True
    )
    assert b"is not in any imported module" in done.stdout


def test_the_later_of_two_local_classes_of_one_name_is_refused():
    """While the first class lives, values of another class of its name are refused."""

    def make():
        class Local(BaseModel):
            a: int = 1

        return Local

    one, two = make(), make()
    payload = encode(one())
    with pytest.raises(EncodeError, match="two different classes are named"):
        encode({"x": two()})
    assert type(decode(payload)) is one


def test_a_local_class_does_not_live_longer_for_having_been_encoded():
    """The codec's memory of classes keeps none of them alive."""
    import weakref

    def make():
        Local = collections.namedtuple("Local", "a")
        decode(encode(Local(1)))
        return weakref.ref(Local)

    ref = make()
    gc.collect()
    assert ref() is None


def test_a_class_whose_name_leads_elsewhere_is_refused():
    """An instance of a class that was replaced under its name is refused, not mixed up."""
    old = dataclasses.make_dataclass("Frozen", ["a"])
    old.__module__ = __name__
    with pytest.raises(EncodeError, match="two different classes"):
        encode(old(1))


@pytest.mark.parametrize("kind", ["dataclass", "model", "named"])
def test_a_class_that_changed_its_fields_is_a_miss(kind, monkeypatch):
    """A payload of a class with other fields is refused rather than half restored."""

    def make(*names: str) -> type:
        if kind == "dataclass":
            made = dataclasses.make_dataclass("Changing", names)
        elif kind == "model":
            from pydantic import create_model

            made = create_model("Changing", **dict.fromkeys(names, (int, 0)))
        else:
            made = collections.namedtuple("Changing", names)
        made.__module__, made.__qualname__ = __name__, "Changing"
        monkeypatch.setattr(sys.modules[__name__], "Changing", made, raising=False)
        return made

    payload = encode(make("a", "b")(a=1, b=2))
    make("a", "b")
    decode(payload)
    make("a", "c")
    with pytest.raises(DecodeError, match="other fields"):
        decode(payload)
    monkeypatch.setattr(sys.modules[__name__], "Changing", Color)
    with pytest.raises(DecodeError):
        decode(payload)


def compose(*records: tuple[int, bytes], root: Any) -> bytes:
    """A payload put together by hand."""
    encoder = Encoder()
    encoder.start()
    for tag, content in records:
        encoder.record(tag, content)
    return encoder.compose(ormsgpack.packb([FORMAT, root]))


def part(index: int) -> ormsgpack.Ext:
    return ormsgpack.Ext(0, index.to_bytes(4, "little"))


def body(tag: int, head: Any, parts: list[Any]) -> tuple[int, bytes]:
    return tag, ormsgpack.packb([head, parts])


def named(ref: str) -> bytes:
    """A payload with one instance of the class that ``ref`` names."""
    return compose(body(Tag.RECORD, [ref, 0], [{"a": 1}, None]), root=part(0))


@pytest.mark.parametrize(
    "ref",
    [
        "builtins:object",
        "builtins:type",
        "threading:Thread",
        "os:system",
        "os:environ",
        "nowhere:X",
        ":",
        "",
        "sys:modules",
        "langgraph_perf.codec:Allowlist.of",
        "subprocess:Popen",
        "decimal:Decimal",
        "builtins:dict",
        f"{__name__}:Client",
        "typing:Any",
        "collections.abc:Mapping",
        "enum:Enum",
        "pydantic:BaseModel",
        "x" * 10_000,
    ],
)
def test_a_payload_cannot_name_just_any_class(ref):
    """Only classes of a storable kind, under their own name, are ever restored."""
    for tag, head, parts in (
        (Tag.MODEL, [[]], [{}, None, None]),
        (Tag.MODEL_V1, [[]], [{}, None]),
        (Tag.RECORD, [], [{}, None]),
        (Tag.NAMED, [], []),
        (Tag.ENUM, ["a"], []),
        (Tag.FLAG, [], [1]),
    ):
        payload = compose(body(tag, [ref, 0, *head], parts), root=part(0))
        with pytest.raises(DecodeError, match=r"^type "):
            decode(payload)


def test_no_module_is_imported_and_no_lazy_one_loaded(tmp_path, monkeypatch):
    """A payload that names an absent or lazily loaded module loads nothing."""
    (tmp_path / "absent_module.py").write_text("raise AssertionError('imported')\n")
    (tmp_path / "lazy_module.py").write_text("raise AssertionError('loaded')\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.find_spec("lazy_module")
    assert spec is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lazy)
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)

    module = types.ModuleType("hooked_module")
    module.__getattr__ = lambda name: calls.append(name)
    monkeypatch.setitem(sys.modules, "hooked_module", module)
    for ref in ("absent_module:X", "lazy_module:X", "hooked_module:X"):
        with pytest.raises(DecodeError, match="not in any imported module"):
            decode(named(ref))
    assert "absent_module" not in sys.modules
    assert calls == []


def test_numpy_is_not_imported_to_decode():
    """A process without numpy treats numpy data as a miss and imports nothing."""
    code = (
        "import sys\nfrom langgraph_perf.codec import DecodeError, decode\n"
        "assert 'numpy' not in sys.modules\n"
        "for line in sys.stdin:\n"
        "    try: decode(bytes.fromhex(line))\n"
        "    except DecodeError as exc: print(exc, 'numpy' in sys.modules)"
    )
    values = np.zeros(3), np.float64(1), np.str_("x"), np.array([None])
    payloads = "\n".join(encode(value).hex() for value in values).encode()
    done = subprocess.run(
        [sys.executable, "-c", code], input=payloads, capture_output=True, check=True
    )
    assert done.stdout.count(b"has not imported numpy False") == 4


# -- hostile bytes --------------------------------------------------------------------------------

SAMPLES = [
    encode(value)
    for value in (
        {"messages": MESSAGES},
        LANGGRAPH,
        [Plain(1), Model(a=1), IntBox(item=1), Point(1)],
        {1: {2, (3,)}, "\ud800": 2**80},
        numpy_values()[:20],
        STDLIB[:30],
        STDLIB[30:],
        {"a": [1.5, "x"]},
    )
]


def survives(payload: bytes) -> None:
    with contextlib.suppress(DecodeError):
        decode(payload)
    assert calls == []


hostile = settings(max_examples=300, suppress_health_check=list(HealthCheck))


@hostile
@given(st.binary(max_size=300))
def test_random_bytes_give_a_value_or_decode_error(payload):
    """Random bytes, with and without the right beginning, raise nothing but DecodeError."""
    survives(payload)
    survives(bytes([0xC1, FORMAT]) + payload)
    survives(bytes([0x92, FORMAT]) + payload)


@hostile
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_payloads_give_a_value_or_decode_error(payload, data):
    """Flipped, replaced, removed and doubled bytes raise nothing but DecodeError."""
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    survives(bytes(damaged))
    cut = data.draw(st.integers(0, len(damaged)))
    survives(bytes(damaged[:cut] + damaged[cut + 1 :]))
    survives(bytes(damaged[:cut] + damaged[max(0, cut - 5) :]))


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_a_truncated_payload_is_always_refused(sample):
    """No beginning of a payload is taken for a whole one."""
    payload = SAMPLES[sample]
    for cut in range(0, len(payload), max(1, len(payload) // 300)):
        with pytest.raises(DecodeError):
            decode(payload[:cut])


plans = st.recursive(
    st.none()
    | st.integers(-5, 5)
    | st.text(max_size=3)
    | st.floats()
    | st.binary(max_size=3)
    | st.builds(lambda n: ormsgpack.Ext(0, n.to_bytes(4, "little")), st.integers(0, 4)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@hostile
@given(st.lists(st.tuples(st.integers(0, 37), plans, plans), max_size=4), plans)
def test_well_formed_nonsense_gives_a_value_or_decode_error(parts, root):
    """Records of every kind with contents of the wrong kind raise nothing but DecodeError."""
    encoder = Encoder()
    encoder.start()
    for tag, head, inside in parts:
        encoder.record(tag, ormsgpack.packb([head, inside if type(inside) is list else [inside]]))
    survives(encoder.compose(ormsgpack.packb([FORMAT, root])))


def array(spec: Any, shape: Any, raw: bytes = b"", order: str = "C") -> tuple[int, bytes]:
    head = ormsgpack.packb([spec, shape, order])
    return Tag.ARRAY, len(head).to_bytes(4, "little") + head + raw


BOMBS = {
    "doubling": compose(
        *(body(Tag.TUPLE, None, [part(i - 1)] * 2 if i else []) for i in range(50)),
        body(Tag.SET, None, [part(49)]),
        root=part(50),
    ),
    "deep": compose(
        *(body(Tag.TUPLE, None, [part(i - 1)] if i else []) for i in range(200_000)),
        body(Tag.SET, None, [part(199_999)]),
        root=part(200_000),
    ),
    "forward": compose(
        body(Tag.TUPLE, None, [part(1)]), body(Tag.TUPLE, None, [part(0)]), root=part(0)
    ),
    "huge array": compose(array("<f8", [2**40], b"12345678"), root=part(0)),
    "long array": compose(array("<f8", [1], b"123456789"), root=part(0)),
    "negative array": compose(array("<f8", [-1, -1], b"12345678"), root=part(0)),
    "huge empty array": compose(array("<f8", [0, 2**62]), root=part(0)),
    "no items": compose(array("V0", [2**62]), root=part(0)),
    "objects": compose(array("O", [1], b"12345678"), root=part(0)),
    "hidden objects": compose(
        array(
            {
                "names": ["a"],
                "formats": ["O"],
                "offsets": [0],
                "titles": [None],
                "itemsize": 8,
                "aligned": False,
            },
            [1],
            b"12345678",
        ),
        root=part(0),
    ),
    "many dims": compose(array("<f8", [1] * 1000, b"12345678"), root=part(0)),
    "bytes of a number": compose(body(Tag.UUID, [2**40, "unknown"], []), root=part(0)),
    "text of a number": compose(body(Tag.NP_TEXT, None, [2**40]), root=part(0)),
    "zone path": compose(body(Tag.ZONE, "../../../etc/passwd", []), root=part(0)),
    "zone module": compose(body(Tag.ZONE, "a.b/c", []), root=part(0)),
    "debug pattern": compose(body(Tag.PATTERN, int(re.DEBUG), ["a"]), root=part(0)),
    "no path": compose(body(Tag.PATH, "Path", ["x"]), root=part(0)),
    "factory": compose(body(Tag.DEFAULT, "eval", []), root=part(0)),
    "unhashable": compose(body(Tag.SET, None, [[]]), root=part(0)),
    "odd pairs": compose(body(Tag.PAIRS, None, [1]), root=part(0)),
    "no records": bytes([0xC1, FORMAT]) + bytes(4),
    "many records": b"\xc1\x01\xff\xff\xff\xff",
    "no root": b"\xc1\x01\x01\x00\x00\x00" + bytes([Tag.INT]) + b"\x01\x00\x00\x00\x05",
    "old format": ormsgpack.packb([0, 1]),
    "new format": b"\xc1\x02" + bytes(4),
    "empty": b"",
    "plain ext": ormsgpack.packb([FORMAT, part(0)]),
    "foreign": b'{"a": 1}',
    "three": b"\x93\x01\x02\x03",
    "long list": b"\x92\x01\xdd\xff\xff\xff\xff",
    "long text": b"\x92\x01\xdb\x7f\xff\xff\xff",
    "deep lists": b"\x92\x01" + b"\x91" * 900_000,
    "pickle": b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("payload", BOMBS.values(), ids=BOMBS.keys())
def test_small_hostile_payloads_are_refused_at_once(payload):
    """No payload makes decoding hang, allocate much more than its own size, or crash."""
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 + 200 * len(payload)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [None, 5, "a", b"a", [], {"a": [1.5, "x"]}], ids=repr)
@pytest.mark.parametrize(
    "more",
    [b"\0", b"\xc0", b"\xc1", b"\xc4\x10", b"\x91", b"x" * 100, encode(1)],
    ids=["int", "nil", "never", "bytes", "list", "many", "payload"],
)
def test_nothing_may_follow_a_payload(value, more):
    """Bytes after the end of a payload, with or without records, are refused."""
    for payload in (encode(value), encode((value,))):
        with pytest.raises(DecodeError):
            decode(payload + more)


@pytest.mark.parametrize("key", ["../../../etc/passwd", "a.b/c", "", "/etc/x"])
def test_a_zone_is_only_looked_for_under_a_plain_name(key):
    """What could name another file, or a module of the time zone package, never gets that far."""
    with pytest.raises(DecodeError, match="names no time zone"):
        decode(compose(body(Tag.ZONE, key, []), root=part(0)))


def test_a_big_fraction_is_not_reduced():
    """Hostile numbers of a megabyte are not brought to lowest terms."""
    big = compose(
        (Tag.INT, b"\x55" * 500_000),
        (Tag.INT, b"\x33" * 500_000),
        body(Tag.FRACTION, None, [part(0), part(1)]),
        root=part(2),
    )
    assert type(decode(big)) is fractions.Fraction


def test_a_memoryview_decodes():
    """Part of a larger buffer decodes without a copy."""
    for value in ({"a": 1}, (1, 2)):
        payload = encode(value)
        assert decode(memoryview(b"xx" + payload)[2:]) == value


# -- properties -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.binary(max_size=8)
    | st.text(st.characters(), max_size=8)
    | st.text(st.characters(categories=["Cs", "L"]), max_size=3)
    | st.binary(max_size=4).map(bytearray)
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(dt.timezone.utc))
    | st.timedeltas()
    | st.fractions()
    | st.sampled_from([Color.RED, Level.LOW, Mode.FAST, Right.READ | Right.WRITE])
)
keys = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.dates(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.builds(Slotted, st.integers(), inner),
        st.builds(Open, x=inner),
        st.builds(Point, st.integers(), inner),
        st.sets(keys, max_size=3),
        st.lists(inner, max_size=3).map(collections.deque),
        st.builds(lambda x: lc.ToolMessage("x", tool_call_id="1", artifact=x), inner),
        st.builds(lambda x: Command(update=x), inner),
    ),
    max_leaves=12,
)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(values)
def test_any_value_comes_back_exactly(value):
    """decode(encode(x)) equals x and has its type at every level, natively or not."""
    assert same(roundtrip(value), value)
    walker = Walker()
    assert same(decode(walker.encode(value)), value)


def test_the_walk_and_the_native_way_agree():
    """Both ways of encoding give payloads that decode to the same value."""
    for value in (*PLAIN, *STDLIB, *MESSAGES, *LANGGRAPH, *numpy_values()):
        assert same(decode(Walker().encode(value)), value)


def test_threads_may_encode_and_decode_at_once():
    """Concurrent use of fresh classes gives everybody the right values."""
    made = [dataclasses.make_dataclass(f"Fresh{i}", ["a"]) for i in range(20)]
    start = threading.Barrier(8)
    failures: list[Any] = []

    def work() -> None:
        start.wait()
        failures.extend(cls for cls in made if decode(encode([cls(1)])) != [cls(1)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- types in schemas -----------------------------------------------------------------------------

UserId = NewType("UserId", Slotted)
BoundT = TypeVar("BoundT", bound=Frozen)


class Deep(BaseModel):
    point: Point
    boxes: list[Box[Slotted]]
    mode: Literal[Mode.FAST] = Mode.FAST


class Graph(TypedDict):
    messages: Annotated[list[lc.AnyMessage], lambda a, b: a + b]
    deep: NotRequired[dict[str, tuple[Deep, ...]] | None]
    user: UserId
    any: Any
    bound: BoundT
    call: typing.Callable[[Right], Child]
    plain: list[Plain]


@dataclasses.dataclass
class Dangling:
    a: Missing  # noqa: F821
    b: Color


def test_types_in_finds_what_a_schema_can_hold():
    """Classes are found through every kind of hint."""
    found = types_in(Graph)
    assert found >= {
        Deep,
        Point,
        Box,
        Box[Slotted],
        Slotted,
        Mode,
        Plain,
        Frozen,
        Right,
        Child,
        lc.AIMessage,
    }
    assert Client not in found
    assert types_in(Outer) == {Outer, Outer.Inner}
    assert types_in(Dangling) == {Dangling, Color}
    assert types_in([Color, list[Point]]) == {Color, Point}


@pytest.mark.parametrize(
    "hint",
    [
        None,
        1,
        "Nope",
        ...,
        Any,
        typing.Union,
        list,
        dict[str, "Nope"],  # noqa: F821
        lambda: 1,
        object(),
        Client,
        T,
        typing.ForwardRef("Nope"),
        Literal["a"],
        typing.NoReturn,
        [],
        (),
        StateSnapshot,
        Exception,
    ],
    ids=lambda hint: re.sub(" at 0x.*", "", str(hint)),
)
def test_types_in_survives_odd_hints(hint):
    """A hint that means nothing here is no error."""
    assert isinstance(types_in(hint), set)


def test_types_in_survives_recursive_and_hostile_hints():
    """Classes that refer to themselves or raise when looked at are no error."""

    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            raise RuntimeError(name)

    class Odd(metaclass=Meta):
        pass

    class Tree(BaseModel):
        children: list[Tree]
        odd: Any = None

    assert types_in(Tree) == {Tree}
    assert types_in(list[Tree] | None) == {Tree}
    assert types_in([Odd, Color]) == {Color}


def test_the_types_of_a_schema_make_its_values_come_back_in_strict_mode():
    """Allowlist.of(*types_in(schema)) is enough for every value of that schema."""
    value = {"deep": {"a": (Deep(point=Point(1), boxes=[Box[Slotted](item=Slotted(1))]),)}}
    allowed = Allowlist.of(*types_in(Graph), strict=True)
    assert same(roundtrip(value, allowed), value)


@pytest.mark.parametrize("size", [8180, 8190, 8200, 65_530, 65_540])
@pytest.mark.parametrize("letter", ["x", "é", b"x"], ids=["ascii", "not ascii", "bytes"])
def test_long_texts_and_bytes_keep_to_their_length(letter, size):
    """What is nothing but a long text or bytes is read in one step, which misses no damage."""
    value = letter * size
    payload = encode(value)
    assert decode(payload) == decode(memoryview(payload)) == value
    assert type(decode(memoryview(payload))) is type(value)
    for wrong in (payload + b"x", payload[:-1], payload[:5] + payload[6:]):
        with pytest.raises(DecodeError):
            decode(wrong)
    if isinstance(value, str):
        with pytest.raises(DecodeError):
            decode(payload[:-1] + b"\xff")


def test_headers_that_claim_too_much_are_seen() -> None:
    """What older releases of ormsgpack crash on is refused before they see it; nothing else is."""
    forged = bytes.fromhex("9201ddf853360001010193")
    with pytest.raises(ValueError, match="claims more"):
        require_honest(forged)
    with pytest.raises(DecodeError):
        decode(forged)


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(), inner, max_size=40),
)


@given(_json)
def test_honest_headers_are_read(value: Any) -> None:
    """Whatever msgpack can say is understood."""
    raw = ormsgpack.packb([value, "\u07dd" * 40])
    assert ormsgpack.packb(checked_unpackb(raw)) == raw
