"""Keys: equal values, equal digests, everywhere; unequal values, different digests."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import hashlib
import ipaddress
import itertools
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import types
import uuid
import zoneinfo
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langgraph.types import Command, Interrupt, Overwrite, Send
from pydantic import BaseModel, ConfigDict, PrivateAttr, RootModel

from langgraph_perf.keys import Unkeyable, digest


def key(value: Any) -> str:
    return digest(("state", value))


def path_of(value: Any) -> str:
    with pytest.raises(Unkeyable) as caught:
        key(value)
    assert caught.value.path in str(caught.value)
    assert caught.value.reason
    return caught.value.path


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Shade(enum.Enum):
    RED = "red"


class Word(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Right(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: Any = 1
    y: Any = 2


@dataclasses.dataclass
class Vector:
    x: Any = 1
    y: Any = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any = 1


class Pair(NamedTuple):
    x: Any = 1
    y: Any = 2


class Model(BaseModel):
    x: Any = 1


class Other(BaseModel):
    x: Any = 1


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    x: Any = 1
    _hidden: Any = PrivateAttr(default=0)


class Root(RootModel[list[Any]]):
    pass


class Text(str):
    pass


class Items(list):
    pass


class Record(dict):
    pass


class Count(int):
    pass


nan = float("nan")

DIFFERENT: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    2**64,
    2**64 + 1,
    -(2**63) - 1,
    10**5000,
    0.0,
    -0.0,
    1.0,
    nan,
    float("inf"),
    1j,
    complex(1, 0),
    complex(nan, 0),
    "",
    "0",
    "1",
    "None",
    "nan",
    "é",
    "e\u0301",
    "\ud800",
    "\ud83d\ude00",
    "😀",
    "ż",
    b"",
    b"1",
    b"\xc5\xbc",
    bytearray(b"1"),
    memoryview(b"1"),
    memoryview(b"1234").cast("B", (2, 2)),
    [],
    [1],
    [[1]],
    [1, 1],
    [None],
    ["1"],
    [True],
    [1.0],
    [b"1"],
    [bytearray(b"1")],
    [(1,)],
    [nan],
    (),
    (1,),
    (1, 2),
    ((1,), 2),
    (1, (2,)),
    {},
    {"a": 1},
    {"a": "1"},
    {"a": True},
    {"a": {}},
    {"a": []},
    {"a": None},
    {"b": 1},
    {1: "a"},
    {1.5: "a"},
    {"1": "a"},
    {b"1": "a"},
    {None: "a"},
    {"None": "a"},
    {(1, 2): "a"},
    {"\ud800": 1},
    {"a": nan},
    {"a": b"\xc4"},
    {"a": "ń"},
    set(),
    {1},
    {"1"},
    {1, 2},
    frozenset(),
    frozenset({1}),
    collections.OrderedDict(a=1, b=2),
    collections.OrderedDict(b=2, a=1),
    {"a": 1, "b": 2},
    collections.defaultdict(int, a=1),
    collections.defaultdict(list, a=1),
    collections.defaultdict(None, a=1),
    collections.Counter(a=1),
    collections.deque([1]),
    collections.deque([1], maxlen=2),
    types.MappingProxyType({"a": 1}),
    Pair(),
    Pair(2, 1),
    Text("1"),
    Items([1]),
    Record(a=1),
    Count(1),
    Color.RED,
    Color.BLUE,
    Shade.RED,
    Word.RED,
    Number.ONE,
    Right.READ,
    Right.READ | Right.WRITE,
    Point(),
    Point(2, 1),
    Vector(),
    Slotted(),
    Model(),
    Model(x=2),
    Root([1]),
    Root([2]),
    Root([[1]]),
    Other(),
    Open(),
    Open(y=1),
    Open(z=1),
    types.SimpleNamespace(),
    types.SimpleNamespace(a=1),
    types.SimpleNamespace(a=2),
    Slotted(2),
    dt.date(2024, 1, 1),
    dt.datetime(2024, 1, 1),
    dt.datetime(2024, 1, 1, fold=1),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc),
    dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
    dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Paris")),
    dt.time(1),
    dt.timedelta(days=1),
    dt.timezone.utc,
    zoneinfo.ZoneInfo("UTC"),
    "2024-01-01",
    uuid.UUID(int=1),
    decimal.Decimal(1),
    decimal.Decimal("1.0"),
    decimal.Decimal("NaN"),
    fractions.Fraction(1, 2),
    pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("a"),
    range(3),
    range(4),
    slice(3),
    slice(None, 3, 1),
    re.compile("a"),
    re.compile(b"a"),
    re.compile("a", re.IGNORECASE),
    ipaddress.ip_address("1.2.3.4"),
    ipaddress.ip_network("1.2.3.4"),
    ipaddress.ip_interface("1.2.3.4"),
    int,
    float,
    Point,
    Color,
    ...,
    NotImplemented,
    np.uint8(1),
    np.int8(1),
    np.int64(1),
    np.float64(1),
    np.float32(1),
    np.bool_(True),
    np.str_("1"),
    np.bytes_(b"1"),
    np.datetime64("2024-01-01"),
    np.datetime64("2024-01-01", "s"),
    np.datetime64("NaT", "s"),
    np.array(1),
    np.array([1], "uint8"),
    np.array([1], "int8"),
    np.array([[1]], "int8"),
    np.array([1], "<i4"),
    np.array([1], ">i4"),
    np.array([16777216], "<i4"),
    np.array([], "int8"),
    np.zeros((0, 2), "int8"),
    np.zeros((2, 0), "int8"),
    np.array([1, 2, 3, 4], "int8"),
    np.array([[1, 2], [3, 4]], "int8"),
    np.array([[1, 3], [2, 4]], "int8"),
    np.array([0.0]),
    np.array([-0.0]),
    np.array([nan]),
    np.array(["a"]),
    np.array(["a"], "U2"),
    np.array([b"a"]),
    np.array([1], object),
    np.array(["1"], object),
    np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
    np.array([(1, 2.0)], [("a", "i4"), ("c", "f8")]),
    np.dtype("int8"),
    Send("a", {"x": 1}),
    Send("b", {"x": 1}),
    Command(update={"x": 1}),
    Command(goto="a"),
    Interrupt(value=1, id="a"),
    Overwrite(1),
    Document(page_content="a"),
    Document(page_content="a", metadata={"p": 1}),
]


def test_types_and_values_are_told_apart():
    """No two of many confusable values share a digest, alone or inside a container."""
    for wrap in (lambda v: v, lambda v: [v], lambda v: {"k": v}, lambda v: (0, [v], "x")):
        seen: dict[str, Any] = {}
        for value in DIFFERENT:
            other = seen.setdefault(key(wrap(value)), value)
            assert other is value, f"{other!r} and {value!r}"


@pytest.mark.parametrize(
    "value",
    [v for v in DIFFERENT if not isinstance(v, (memoryview, types.MappingProxyType))],
    ids=lambda v: type(v).__name__,
)
def test_copies_have_the_same_digest(value):
    """A deep copy is the same value; nothing of an object's identity is in the digest."""
    assert key(copy.deepcopy(value)) == key(value)
    assert key([copy.deepcopy(value)]) == key([value])


def test_parts_are_told_apart_by_name_and_order():
    """What is in one part never passes for something in another."""
    keys = {
        digest(("a", 1), ("b", 2)),
        digest(("a", 2), ("b", 1)),
        digest(("b", 2), ("a", 1)),
        digest(("a", 1)),
        digest(("a", [1, "b", 2])),
        digest(),
    }
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: "a", "x": 2}, {"x": 2, 1: "a"}),
        ({"a", "b", "c"}, {"c", "b", "a"}),
        (nan, -nan),
        ({"x": nan}, {"x": -nan}),
        (np.array([nan]), np.array([-nan])),
        (np.array([complex(nan, 1)]), np.array([complex(-nan, 1)])),
        (range(0), range(5, 5)),
        (range(0, 3, 2), range(0, 4, 2)),
        (np.ones((2, 3)), np.asfortranarray(np.ones((2, 3)))),
        (np.arange(10)[::2], np.arange(0, 10, 2)),
        (Open(y=1, z=2), Open(z=2, y=1)),
        (types.SimpleNamespace(a=1, b=2), types.SimpleNamespace(b=2, a=1)),
    ],
)
def test_order_and_layout_do_not_count(one, other):
    """Insertion order, the bits of a NaN and memory layout are no part of a value."""
    assert key(one) == key(other)


def test_padding_between_fields_does_not_count():
    """The bytes between a structured array's fields are arbitrary and are not read."""
    layout = np.dtype([("a", "i1"), ("b", "f8")], align=True)
    one = np.frombuffer(b"\x01" + b"\xaa" * 7 + np.float64(2).tobytes(), layout)
    other = np.frombuffer(b"\x01" + b"\xbb" * 7 + np.float64(2).tobytes(), layout)
    assert one.tobytes() != other.tobytes()
    assert key(one) == key(other)


def test_cached_properties_do_not_count():
    """Having looked at a derived value does not change what it is derived from."""
    import functools

    @dataclasses.dataclass
    class Square:
        side: int

        @functools.cached_property
        def area(self) -> int:
            return self.side**2

    looked_at, fresh = Square(3), Square(3)
    assert looked_at.area == 9
    assert key(looked_at) == key(fresh) != key(Square(4))


def test_attributes_beyond_the_fields_count():
    """What was added to an instance, and a private attribute of a model, is part of the value."""
    point = Point()
    point.z = 3  # type: ignore[attr-defined]
    model = Open()
    model._hidden = 1
    record = Record(a=1)
    record.note = "x"  # type: ignore[attr-defined]
    assert key(point) != key(Point())
    assert key(model) != key(Open())
    assert key(record) != key(Record(a=1))


def test_times_parsed_by_pydantic_have_a_key():
    """pydantic's own time zone class has one fixed offset, which is what counts."""

    class Event(BaseModel):
        at: dt.datetime

    one, same = Event(at="2024-01-01T00:00:00+01:00"), Event(at="2024-01-01T00:00:00+01:00")
    assert key(one) == key(same) != key(Event(at="2024-01-01T00:00:00+02:00"))


# -- properties -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.sampled_from([0, 1, True, False, 1.0, 0.0, -0.0, "1", b"1", ""])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.frozensets(scalars, max_size=4)
        | st.builds(Point, inner, inner)
        | st.builds(Model, x=inner)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality as keys mean it: by type too, and NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a != a and b != b) or (a == b and str(a) == str(b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same_unordered(list(a.items()), list(b.items()))
    if isinstance(a, frozenset):
        return same_unordered(list(a), list(b))
    if isinstance(a, (Point, Model)):
        return same(vars(a), vars(b))
    return a == b


def same_unordered(a: list[Any], b: list[Any]) -> bool:
    rest = list(b)
    for item in a:
        match = next((i for i, other in enumerate(rest) if same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


@settings(max_examples=400)
@given(values, values)
def test_digests_are_equal_exactly_when_values_are(a, b):
    """No two different generated values collide, and equal ones never differ."""
    assert (key(a) == key(b)) == same(a, b)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3) | st.just("0"), max_size=6), st.integers(0, 6), st.data())
def test_nesting_is_told_apart(items, cut, data):
    """The same leaves, grouped differently, are a different value."""
    kinds = [list, tuple, collections.deque]
    flat = items
    kind = data.draw(st.sampled_from(kinds))
    grouped = [*items[:cut], kind(items[cut:])]
    assert key(flat) != key(grouped)
    other = data.draw(st.sampled_from([k for k in kinds if k is not kind]))
    assert key(grouped) != key([*items[:cut], other(items[cut:])])


@settings(max_examples=200)
@given(values, st.randoms(use_true_random=False))
def test_order_never_counts(value, random):
    """Shuffling every dict leaves the digest as it is."""

    def shuffled(v: Any) -> Any:
        if isinstance(v, dict):
            pairs = [(k, shuffled(x)) for k, x in v.items()]
            random.shuffle(pairs)
            return dict(pairs)
        if isinstance(v, (list, tuple)):
            return type(v)(map(shuffled, v))
        return v

    assert key(shuffled(value)) == key(value)


def test_other_processes_agree():
    """Digests are the same under any hash seed, in any process."""
    program = textwrap.dedent(
        """
        import dataclasses, enum, sys, uuid
        from langchain_core.messages import AIMessage, HumanMessage
        from langgraph_perf.keys import digest

        class Color(enum.Enum):
            RED = "red"

        @dataclasses.dataclass
        class Point:
            x: object

        names = {"a", "b", "c", "d", "e", "f"}
        state = {
            "names": names,
            "by_name": {name: len(name) for name in names},
            "frozen": {frozenset(names): Point(Color.RED)},
            "messages": [HumanMessage("hi", id=str(uuid.uuid4())),
                         AIMessage("yes", id=str(uuid.uuid4()))],
            "classes": [int, Point],
        }
        print(digest(("state", state)))
        """
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1
    assert re.fullmatch(r"[0-9a-f]{40}\n", outputs.pop())


def test_known_digests():
    """Keys are BLAKE2b digests of 160 bits, and the same in every version of this library: another
    hash, or another way to encode, is a decision to lose all that was stored."""
    assert digest() == hashlib.blake2b(b"langgraph_perf key 1\0", digest_size=20).hexdigest()
    assert digest() == "bcf815e05f7ab60d1dfff47f932cf93fe6eb479e"
    assert key({"query": "q"}) == "684837376cbc965b02d0bceac2f0a8a1fdcc939a"
    assert key([1, 2.5, None, ("a", b"b"), {3}]) == "c28f4f1f0cf0ea6b47deb3b0fb3e79c1cf754429"


# -- what cannot be keyed -------------------------------------------------------------------------


class Client:
    """A stand-in for a database client."""


class Bare:
    __slots__ = ("x",)


def generator():
    yield 1


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Client(),
        Bare(),
        Client,  # found under its name, so a class has a key: see below
        print,
        len,
        lambda: None,
        generator(),
        threading.Lock(),
        sys.stdout,
        Client().__init__,
        collections.defaultdict(lambda: 0),
        iter([]),
        {}.keys(),
        list[int],
        type("Made", (), {}),
        np.random.default_rng(),
        np.ma.masked_array([1], [True]),
        np.array([1], "longdouble"),
        np.array([object()], object),
        dt.datetime(2024, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()),
        Exception("x"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_has_no_canonical_value_is_refused(value):
    """Objects without a canonical value raise, wherever they are, with the path to them."""
    if value is Client:
        assert key(value) != key(Point)
        return
    assert path_of(value).startswith("state")
    assert path_of({"a": [0, value]}).startswith('state["a"][1]')


def test_paths_lead_to_the_culprit():
    """The path reads like the expression that reaches the value."""
    bad = Client()
    assert path_of({"client": bad}) == 'state["client"]'
    assert path_of({"docs": [1, 2, 3, Point(x=bad)]}) == 'state["docs"][3].x'
    assert path_of({3: bad}) == "state[3]"
    assert path_of({'say "hi"': bad}) == 'state["say \\"hi\\""]'
    assert path_of((0, {"a": bad})) == 'state[1]["a"]'
    assert path_of(Model(x=[bad])) == "state.x[0]"
    assert path_of(Open(y=bad)) == "state.y"
    assert path_of({"s": frozenset([bad])}) == 'state["s"]{…}'
    assert path_of({bad: 1}) == "state.keys()"
    assert path_of(Document(page_content="x", metadata={"c": bad})) == 'state.metadata["c"]'
    assert path_of(Send("n", {"c": bad})) == 'state.arg["c"]'
    with pytest.raises(Unkeyable, match=r"^context\.db: a .*Client is not plain data; accepted"):
        digest(("context", types.SimpleNamespace(db=bad)))


def test_local_classes_have_no_key_but_their_instances_do():
    """A class that cannot be found under its name could be any; a value says what it holds."""

    def make(default: int) -> Any:
        @dataclasses.dataclass
        class Local:
            x: int = default

        return Local

    assert path_of({"c": make(1)}) == 'state["c"]'
    assert key(make(1)()) == key(make(1)()) != key(make(2)())


def test_endless_values_are_refused():
    """A value that contains itself, or is nested without measure, raises and does not crash."""
    cycle: list[Any] = []
    cycle.append(cycle)
    wide: dict[str, Any] = {}
    wide.update(a=wide, b=wide, c=object)
    point = Point()
    point.x = point
    deep: Any = ()
    for _ in range(100_000):
        deep = (deep,)
    plain: Any = []
    for _ in range(100_000):
        plain = [plain]
    for value in (cycle, wide, point, deep, plain):
        assert len(path_of(value)) < 400
    while deep:  # taken apart by hand, for CPython would recurse
        (deep,) = deep
    while plain:
        (plain,) = plain


def test_reasonable_nesting_has_a_key():
    """A hundred levels are nothing unusual."""
    value: Any = {"leaf": (1,)}
    for _ in range(100):
        value = {"inner": value}
    assert key(value) == key(copy.deepcopy(value))


class Hostile:
    """Raises whatever is done to it."""

    def _no(self, *args: Any) -> Any:
        raise RuntimeError("hostile")

    __eq__ = __iter__ = __len__ = __getitem__ = __bool__ = __repr__ = __reduce__ = _no
    __getattr__ = _no

    def __hash__(self) -> int:
        return 1


class HostileDict(dict):
    def _no(self, *args: Any) -> Any:
        raise RuntimeError("hostile")

    __iter__ = __len__ = __getitem__ = items = keys = values = __eq__ = __contains__ = copy = _no
    __hash__ = None  # type: ignore[assignment]


class HostileMeta(type):
    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("hostile")

    def __hash__(cls) -> int:
        raise RuntimeError("hostile")


class Strange(metaclass=HostileMeta):
    pass


@dataclasses.dataclass
class Sly:
    x: int = 1

    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("ran user code")

    @property
    def extra(self) -> int:
        raise RuntimeError("ran user code")


def test_hostile_objects_are_refused_or_read_without_asking_them():
    """No method or property of a foreign class runs; what it raises never ends the run."""
    for value in (Hostile(), Strange(), [Hostile()], {"a": Hostile()}):
        assert path_of(value).startswith("state")
    assert path_of({Hostile(): 1}) == "state.keys()"
    assert key(HostileDict(a=1)) == key(HostileDict(a=1)) != key(HostileDict(a=2))
    assert key(Sly()) != key(Sly(2))
    assert key(Strange) != key(Hostile)


def test_attributes_are_read_without_running_properties():
    """A property with the name of nothing special is never asked."""
    calls = []

    @dataclasses.dataclass
    class Watched:
        x: int = 1

        def __getattribute__(self, name: str) -> Any:
            calls.append(name)
            return object.__getattribute__(self, name)

    value = Watched()
    calls.clear()
    key(value)
    assert calls == []


def test_values_changed_while_they_are_keyed_do_no_harm():
    """Keying while other threads change the value gives some digest or a refusal, no crash."""
    value: dict[str, Any] = {"items": [], "by": {1: (1,)}}
    stop = threading.Event()

    def change() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            value["items"].append((n,))
            value["by"][n % 50] = (n,)
            value["by"].pop((n + 25) % 50, None)
            if n % 50 == 0:
                value["items"].clear()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(Unkeyable):
                key(value)
    finally:
        stop.set()
        thread.join()


def test_threads_agree():
    """Many threads that key the same values at once get the same digests."""
    state = {"a": [Point(Color.RED), {"x": {1, 2, 3}}], "b": Model(x=np.arange(5)), "c": (1, "ü")}
    want = key(state)
    barrier = threading.Barrier(8)
    got: list[str] = []

    def work() -> None:
        barrier.wait()
        got.extend(key(copy.deepcopy(state)) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want] * 160


def test_classes_are_not_kept_alive():
    """What is remembered about a class goes with the class."""
    import gc
    import weakref

    def make() -> weakref.ref[type]:
        @dataclasses.dataclass
        class Local:
            x: int = 1

        key(Local())
        return weakref.ref(Local)

    ref = make()
    gc.collect()
    assert ref() is None


def test_numpy_is_not_imported_for_keys():
    """Keys work, and import no numpy, where none is in use."""
    program = (
        "import sys; from langgraph_perf import keys;"
        "before = 'numpy' in sys.modules;"
        "keys.digest(('state', {'a': (1, {2})}));"
        "assert before or 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
