"""``Registry`` and ``Use``: resources by name, several leases at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from langgraph_perf.errors import ConfigurationError, LeaseError, PoolClosed, PoolTimeout
from langgraph_perf.resources import FromContext, Keyed, Pool, Registry, Shared, Use, Want
from langgraph_perf.resources.registry import _gate

from .helpers import PATIENCE, Holder, Maker, Thing, auntil, until

Watch = Callable[[Any], Any]


@dataclass
class Parts:
    """A pool, a shared and a keyed resource, and the registry that knows them."""

    db: Pool[Thing]
    embedder: Shared[Thing]
    models: Keyed[Thing]
    registry: Registry


@pytest.fixture
def parts(watch: Watch, maker: Maker) -> Parts:
    db = watch(Pool(maker.create, max_size=2))
    embedder = watch(Shared(maker.create))
    models = watch(Keyed(maker.create, max_size=2))
    return Parts(db, embedder, models, Registry({"models": models, "db": db, "embedder": embedder}))


def test_several_leases_at_once(parts: Parts) -> None:
    """Each label gets its object; all come back together."""
    with parts.registry.lease({"db": None, "embedder": None, "models": "large"}) as values:
        assert values["models"].key == "large"
        assert set(values) == {"db", "embedder", "models"}
        assert parts.registry.stats()["db"].in_use == 1
    assert [stats.in_use for stats in parts.registry.stats().values()] == [0, 0, 0]


async def test_several_async_leases_at_once(parts: Parts) -> None:
    """The same on an event loop."""
    async with parts.registry.alease({"db": None, "models": "large"}) as values:
        assert values["models"].key == "large"
        assert parts.registry.stats()["db"].in_use == 1
    assert [stats.in_use for stats in parts.registry.stats().values()] == [0, 0, 0]


def test_labels_can_differ_from_names(parts: Parts) -> None:
    """``Want`` says which resource; an object that is asked for twice is leased once."""
    wanted = {
        "planner": Want("models", "large"),
        "writer": Want("models", "small"),
        "critic": Want("models", "large"),
    }
    with parts.registry.lease(wanted) as values:
        assert values["planner"] is values["critic"]
        assert values["writer"] is not values["planner"]
        assert parts.models.stats().holders == 2


def test_nothing_wanted_is_fine(parts: Parts) -> None:
    """A node without resources leases nothing."""
    with parts.registry.lease({}) as values:
        assert values == {}


def test_leases_are_taken_in_one_order(watch: Watch, maker: Maker) -> None:
    """Two callers who name their resources in opposite order cannot wait for each other."""
    a, b = (watch(Pool(maker.create, max_size=1, timeout=PATIENCE)) for _ in range(2))
    registry = Registry({"a": a, "b": b})

    def work(names: str) -> None:
        for _ in range(200):
            with registry.lease(dict.fromkeys(names)):
                pass

    threads = [threading.Thread(target=work, args=(names,)) for names in ("ab", "ba") * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert a.stats().leases == b.stats().leases == 1600
    assert a.stats().timeouts == b.stats().timeouts == 0


def test_the_order_is_the_same_in_every_registry(watch: Watch, maker: Maker) -> None:
    """It goes with the resources, not with the names that a graph has for them."""
    a, b = (watch(Pool(maker.create, max_size=1)) for _ in range(2))
    for registry in (Registry({"x": a, "y": b}), Registry({"y": a, "x": b})):
        with a.lease():
            waiter = threading.Thread(target=_lease_both, args=(registry,))
            waiter.start()
            until(lambda: a.stats().waiting == 1)
            assert b.stats().in_use == 0
        waiter.join()


def _lease_both(registry: Registry) -> None:
    with registry.lease({"x": None, "y": None}):
        pass


def test_several_objects_of_one_resource_cannot_deadlock(watch: Watch, maker: Maker) -> None:
    """Only one caller at a time holds some of them while it waits for more."""
    pool = watch(Pool(maker.create, max_size=2, timeout=PATIENCE))
    registry = Registry({"db": pool})
    maker.hold = threading.Event()
    outcomes: list[object] = []

    def work() -> None:
        try:
            with registry.lease({"a": Want("db"), "b": Want("db")}) as values:
                outcomes.append(len(set(values.values())))
        except PoolTimeout as exc:
            outcomes.append(exc)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: pool.stats().loading == 2 or _gate(pool).stats().waiting == 1)
    maker.hold.set()
    for thread in threads:
        thread.join()
    assert outcomes == [2, 2]


async def test_several_keys_of_one_resource_cannot_deadlock(watch: Watch, maker: Maker) -> None:
    """The same for tasks that each want two of a ``Keyed``'s objects."""
    models = watch(Keyed(maker.acreate, max_size=2, close=maker.aclose))
    registry = Registry({"models": models})
    maker.ahold = asyncio.Event()

    async def work(*keys: str) -> None:
        wanted = {key: Want("models", key) for key in keys}
        async with registry.alease(wanted, timeout=PATIENCE) as values:
            assert [values[key].key for key in keys] == list(keys)

    tasks = [asyncio.create_task(work("a", "b")), asyncio.create_task(work("c", "d"))]
    await auntil(lambda: models.stats().loading == 2 or _gate(models).stats().waiting == 1)
    maker.ahold.set()
    await asyncio.gather(*tasks)
    assert maker.most_alive <= 2
    await models.aclose()


def test_more_objects_than_there_can_be_are_refused(parts: Parts) -> None:
    """Waiting for them would never end."""
    wanted = {str(number): Want("models", number) for number in range(3)}
    with pytest.raises(ConfigurationError, match=r"3 objects of Keyed 'models' .* at most 2"):
        parts.registry.lease(wanted)


def test_what_was_taken_comes_back_when_the_rest_fails(watch: Watch, maker: Maker) -> None:
    """A failing load of the last resource does not keep the first."""

    def broken() -> None:
        raise ConnectionError("down")

    first = watch(Pool(maker.create, max_size=1))
    registry = Registry({"first": first, "broken": watch(Pool(broken))})
    for _ in range(3):
        with pytest.raises(ConnectionError), registry.lease({"broken": None, "first": None}):
            pass
    assert first.stats().idle == 1


async def test_cancelled_while_it_takes_them(watch: Watch, maker: Maker) -> None:
    """What was taken so far comes back."""
    first, full = watch(Pool(maker.create)), watch(Pool(maker.create, max_size=1))
    registry = Registry({"first": first, "full": full})

    async def use() -> None:
        async with registry.alease({"first": None, "full": None}):
            raise AssertionError("never free")

    async with full.alease():
        task = asyncio.create_task(use())
        await auntil(lambda: full.stats().waiting == 1)
        assert first.stats().in_use == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert first.stats().in_use == 0


def test_a_manager_that_swallows_errors_cannot_hide_a_failed_lease(
    watch: Watch, maker: Maker
) -> None:
    """There would be nothing to run the node with."""

    @contextmanager
    def swallow() -> Iterator[None]:
        with suppress(PoolTimeout):
            yield

    full = Pool(maker.create, max_size=1, timeout=0)
    registry = Registry({"swallow": FromContext(swallow), "full": watch(full)})
    registry["swallow"].order = -1
    with (
        full.lease(),
        pytest.raises(PoolTimeout),
        registry.lease({"swallow": None, "full": None}),
    ):
        pass


def test_the_time_limit_is_for_all_together(watch: Watch, maker: Maker) -> None:
    """What the first lease has used up the second one does not have."""
    pools = [watch(Pool(maker.create, max_size=1)) for _ in range(2)]
    registry = Registry({"a": pools[0], "b": pools[1]})
    with (
        pools[1].lease(),
        pytest.raises(PoolTimeout, match="Pool 'b'"),
        registry.lease({"a": None, "b": None}, timeout=0.01),
    ):
        pass


def test_heartbeat_reaches_every_lease(watch: Watch, maker: Maker, impatient: None) -> None:
    """Whichever of them makes the caller wait."""
    pool = watch(Pool(maker.create, max_size=1))
    registry = Registry({"db": pool})
    holder = Holder(pool)
    holder.wait()
    with registry.lease({"db": None}, heartbeat=holder.let_go.set):
        pass
    holder.finish()


def test_leases_are_one_shot(parts: Parts) -> None:
    """Entered or given back a second time, or given back unentered, they raise."""
    leases = parts.registry.lease({"db": None})
    with pytest.raises(LeaseError):
        leases.__exit__(None, None, None)
    with leases, pytest.raises(LeaseError):
        leases.__enter__()
    with pytest.raises(LeaseError):
        leases.__exit__(None, None, None)


@pytest.mark.parametrize("where", [None, "node 'answer'"])
def test_a_forgotten_lease_names_who_took_it(parts: Parts, where: str | None) -> None:
    """Not the registry's own code: the calling line, or what the caller says."""
    leases = parts.registry.lease({"db": None, "embedder": None}, where=where)
    leases.__enter__()
    place = r".*test_registry.py:\d+" if where is None else where
    with pytest.warns(ResourceWarning, match=f"taken at {place} was never given back"):
        del leases
    assert parts.db.stats().forgotten == 1


async def test_closing_closes_all(parts: Parts) -> None:
    """Sync or async, and also when one of them fails to."""
    await parts.registry.aclose()
    parts.registry.close()
    for resource in parts.registry.values():
        key = "x" if resource.keyed else None
        with pytest.raises(PoolClosed), resource.lease(key):
            pass


def test_messages_use_the_names_of_the_registry(parts: Parts, maker: Maker) -> None:
    """The first name a resource is given stays."""
    assert repr(parts.db) == "<Pool 'db'>"
    Registry({"other": parts.db})
    parts.db.close()
    with pytest.raises(PoolClosed, match="Pool 'db' is closed"), parts.db.lease():
        pass
    assert "Maker.create" in repr(Pool(maker.create))


def test_it_is_a_mapping(parts: Parts) -> None:
    """So that a registry with some resources replaced is easily made."""
    other = Shared(dict)
    replaced = Registry({**parts.registry, "embedder": other})
    assert list(replaced) == ["models", "db", "embedder"]
    assert len(replaced) == 3
    assert replaced["embedder"] is other
    assert replaced["db"] is parts.db


def test_unknown_names_are_refused(parts: Parts) -> None:
    """The error says what there is, what may have been meant, and the remedy."""
    with pytest.raises(
        ConfigurationError,
        match=r"'embeder' \(did you mean 'embedder'\?\); there is: 'models', 'db', 'embedder'",
    ):
        parts.registry.lease({"embeder": None})
    with pytest.raises(ConfigurationError, match="there is: none"):
        Registry().find("x")


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"": Shared(dict)}, "names must be non-empty str"),
        ({1: Shared(dict)}, "got 1"),
        ({"db": dict}, "resource 'db' must be a Pool, Shared, Keyed or FromContext"),
        ({"db": None}, r"Shared\(lambda: obj\)"),
    ],
)
def test_what_is_no_resource_is_refused(resources: Any, message: str) -> None:
    """The error says what is accepted."""
    with pytest.raises(ConfigurationError, match=message):
        Registry(resources)


@pytest.mark.parametrize(
    ("use", "sync", "message"),
    [
        (Use("nothing"), True, "no resource is called 'nothing'"),
        (Use("models"), True, "ask for it with Use"),
        (Use("db", key="user"), True, "Pool 'db' has no keys"),
        (Use("loop"), True, "needs an event loop"),
        (Use("loop"), False, None),
        (Use("models", key="model"), True, None),
        (Use("db"), True, None),
    ],
)
def test_what_can_be_known_before_the_run(
    parts: Parts, maker: Maker, use: Use, sync: bool, message: str | None
) -> None:
    """``check`` refuses what could only fail later."""
    registry = Registry({**parts.registry, "loop": Shared(maker.acreate)})
    if message is None:
        registry.check(use, sync=sync)
    else:
        with pytest.raises(ConfigurationError, match=message):
            registry.check(use, sync=sync)


def test_keys_that_do_not_fit_are_refused_when_leased(parts: Parts) -> None:
    """Before anything is taken."""
    for wanted in ({"models": None}, {"models": []}, {"db": "x"}, {"m": Want("models")}):
        with pytest.raises(ConfigurationError):
            parts.registry.lease(wanted)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="timeout must be"):
        parts.registry.lease({}, timeout=-1)


@dataclass
class State:
    """A state that is not a mapping."""

    model: object = "large"


@pytest.mark.parametrize(
    ("use", "state", "want"),
    [
        (Use("db"), {}, Want("db")),
        (Use("m", key="model"), {"model": "large"}, Want("m", "large")),
        (Use("m", key="model"), State(), Want("m", "large")),
        (Use("m", key=lambda state: (state["a"], 1)), {"a": "x"}, Want("m", ("x", 1))),
    ],
)
def test_use_says_what_to_lease(use: Use, state: Any, want: Want) -> None:
    """From a field of the state, of whatever kind it is, or from a function of it."""
    assert use.want(state) == want


@pytest.mark.parametrize(
    ("use", "state", "message"),
    [
        (Use("m", key="model"), {"a": 1, "b": 2}, r"no field 'model'; there is: \['a', 'b'\]"),
        (Use("m", key="modle"), State(), "no field 'modle'; there is: State"),
        (Use("m", key="model"), {"model": None}, "the key is None"),
        (Use("m", key="model"), {"model": ["x"]}, r"must be hashable .* got \['x'\]"),
        (Use("m", key=lambda state: state["x"]), {}, r"the function raised KeyError\('x'\)"),
    ],
)
def test_use_refuses_what_is_no_key(use: Use, state: Any, message: str) -> None:
    """The error names the resource and what is wrong."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        use.want(state)
    assert "Use('m'" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Use(""), "name must be the name of a resource"),
        (lambda: Use(3), "got 3"),  # type: ignore[arg-type]
        (lambda: Use("m", key=3), "key must be the name of a field"),  # type: ignore[arg-type]
        (lambda: Use("m", key=""), "key must be the name of a field"),
    ],
)
def test_use_is_validated(make: Callable[[], Use], message: str) -> None:
    """When it is made, not when a node runs."""
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_use_is_a_value() -> None:
    """Immutable, comparable and hashable."""
    assert Use("db") == Use("db")
    assert hash(Use("m", key="model")) == hash(Use("m", key="model"))
    with pytest.raises(AttributeError):
        Use("db").name = "x"  # type: ignore[misc]
