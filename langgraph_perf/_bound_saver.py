"""A checkpointer that tells the cache what becomes of its threads, and checkpoints of the cache.

It hands everything on to the saver it stands for and is of a class made for that saver's class: it
has the methods which that one has of its own, and no others, since LangGraph and the conformance
suite tell by them what a saver can do.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

# private names of LangGraph; tests/checkpoint/test_threads.py fails when they change
from langgraph._internal._constants import NS_END, NS_SEP, RETURN
from langgraph.checkpoint.base import BaseCheckpointSaver

from langgraph_perf._binding import BINDING, Binding
from langgraph_perf._gathering import part_of, taint
from langgraph_perf._lives import Lives, at_the_end, kept
from langgraph_perf._locks import new_lock
from langgraph_perf._marks import mark_of
from langgraph_perf._provenance import CHANNEL, METADATA, Ledger

Saver = BaseCheckpointSaver[Any]
logger = logging.getLogger("langgraph_perf")


def bound(saver: Saver, lives: Lives) -> Saver:
    """``saver``, whose threads take what they own in the caches with them.

    One that is bound already is bound to these caches as well.
    """
    known = saver.__dict__ if issubclass(type(saver), _Bound) else {}
    inner: Any = known.get("_saver", saver)
    kind: Any = type(inner)
    told = known.get("_told")
    if told is None:
        told = _told_by(inner)
    told.add(lives)
    made: Saver = _class_for(kind)(inner, lives, told, _ledger_of(inner))
    return made


def _told_by(saver: Saver) -> weakref.WeakSet[Lives]:
    """Who is told by all graphs that have this saver: they have its threads in common."""
    with _making:
        try:
            return _told.setdefault(mark_of(saver), weakref.WeakSet())
        except TypeError:  # it cannot be hashed, or not be referred to weakly
            return weakref.WeakSet()


def _ledger_of(saver: Saver) -> Ledger:
    """What was served and is in no checkpoint of ``saver`` yet: any of its graphs may write it."""
    with _making:
        try:
            return _ledgers.setdefault(mark_of(saver), Ledger())
        except TypeError:
            return Ledger()


_making = new_lock()
_ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Lives]] = weakref.WeakKeyDictionary()


def bound_to(saver: object, lives: Lives) -> Saver | None:
    """The saver that ``saver`` stands for; ``None`` if it does not already tell ``lives``, or
    cannot do what that saver can now: a pooled one learns that from the first saver it leases."""
    if not issubclass(type(saver), _Bound):
        return None
    inner: Saver = saver.__dict__["_saver"]
    kind: Any = type(inner)
    fits = type(saver) is _class_for(kind) and lives is saver.__dict__["_lives"]
    return inner if fits else None


class _Bound:
    """What the classes made here have in common.

    Attributes:
        provenance: what was served from the cache and is in no checkpoint yet.
    """

    def __init__(
        self, saver: Saver, lives: Lives, told: weakref.WeakSet[Lives], ledger: Ledger
    ) -> None:
        self.__dict__.update(_saver=saver, _lives=lives, _told=told, provenance=ledger)
        for name in _OPTIONAL:
            base = getattr(BaseCheckpointSaver, name, None)
            if getattr(type(saver), name, None) is not base:
                continue
            # on the object: a method of the class would say that it can
            if getattr(getattr(saver, name, None), "__func__", None) is base:
                self.__dict__[name] = functools.partial(_cannot, type(saver).__name__, name)
            else:
                self.__dict__[name] = types.MethodType(_TELLING[name], self)
        self.__dict__["deletes_runs"] = any(
            not isinstance(getattr(self, name, None), functools.partial)
            for name in ("delete_for_runs", "adelete_for_runs")
            if hasattr(BaseCheckpointSaver, name)
        )

    @property
    def _listeners(self) -> list[Lives]:
        """Whom to tell: this graph's caches, and what others with the same saver have open."""
        own: Lives = self.__dict__["_lives"]
        others = [lives for lives in self.__dict__["_told"] if lives is not own]
        return [own, *[lives for lives in others if not lives.closed]]

    def _tell(self, what: str, *args: Any) -> None:
        """Whatever one of them raises, all are told."""
        with at_the_end() as failures:
            for lives in self._listeners:
                with kept(failures):
                    getattr(lives, what)(*args)

    async def _atell(self, what: str, *args: Any) -> None:
        with at_the_end() as failures:
            for lives in self._listeners:
                with kept(failures):
                    await getattr(lives, what)(*args)

    def __getattr__(self, name: str) -> Any:
        if "_saver" not in self.__dict__:
            raise AttributeError(name)  # being copied: not there yet
        return getattr(self.__dict__["_saver"], name)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_saver"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        saver = copy.deepcopy(self.__dict__["_saver"], memo)
        return type(self)(saver, self.__dict__["_lives"], self.__dict__["_told"], Ledger())

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_saver"], name, value)

    def __copy__(self) -> Any:
        # LangGraph copies a saver to give the copy another serde
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__, _saver=copy.copy(self.__dict__["_saver"]))
        return clone

    def __repr__(self) -> str:
        return repr(self.__dict__["_saver"])


def _handed_on(name: str) -> Any:
    return property(lambda self: getattr(self.__dict__["_saver"], name))


def _put(self: Any, config: Any, checkpoint: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
    nodes, tasks = self.provenance.of(config, metadata)
    told = {**metadata, METADATA: {"cached": nodes}} if nodes else metadata
    result = self._saver.put(config, checkpoint, told, *args, **kwargs)
    if tasks:
        self.provenance.told(config, tasks)
    return result


async def _aput(
    self: Any, config: Any, checkpoint: Any, metadata: Any, *args: Any, **kwargs: Any
) -> Any:
    nodes, tasks = self.provenance.of(config, metadata)
    told = {**metadata, METADATA: {"cached": nodes}} if nodes else metadata
    result = await self._saver.aput(config, checkpoint, told, *args, **kwargs)
    if tasks:
        self.provenance.told(config, tasks)
    return result


def _put_writes(
    self: Any, config: Any, writes: Any, task_id: str, *args: Any, **kwargs: Any
) -> Any:
    told = self.provenance.wrote(config, task_id, writes)
    result = self._saver.put_writes(config, writes, task_id, *args, **kwargs)
    if told:
        with _untold():
            self._saver.put_writes(config, [(CHANNEL, told)], str(uuid4()))
    return result


async def _aput_writes(
    self: Any, config: Any, writes: Any, task_id: str, *args: Any, **kwargs: Any
) -> Any:
    told = self.provenance.wrote(config, task_id, writes)
    result = await self._saver.aput_writes(config, writes, task_id, *args, **kwargs)
    if told:
        with _untold():
            await self._saver.aput_writes(config, [(CHANNEL, told)], str(uuid4()))
    return result


@contextmanager
def _untold() -> Iterator[None]:
    try:
        yield
    except Exception:  # the run does not depend on it
        logger.debug("what came from the cache is not told to other processes", exc_info=True)


def _get_tuple(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    self._lives.started(config)
    found = self._saver.get_tuple(config, *args, **kwargs)
    return _seen(self, config, found)


async def _aget_tuple(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    await self._lives.astarted(config)
    found = await self._saver.aget_tuple(config, *args, **kwargs)
    return _seen(self, config, found)


def _seen(self: Any, config: Any, found: Any) -> Any:
    _notice(config, found)
    # who only looks at the thread will not write the checkpoint of its step
    runs = BINDING in (config.get("configurable") or {})
    return _read(self.provenance if runs else None, found)


def _list(self: Any, *args: Any, **kwargs: Any) -> Any:
    found = self._saver.list(*args, **kwargs)
    return [_read(None, each) for each in found] if isinstance(found, list) else _each(found)


def _each(found: Any) -> Iterator[Any]:
    try:
        for each in found:
            yield _read(None, each)
    finally:
        if hasattr(found, "close"):
            found.close()


async def _alist(self: Any, *args: Any, **kwargs: Any) -> Any:
    found = self._saver.alist(*args, **kwargs)
    try:
        async for each in found:
            yield _read(None, each)
    finally:
        if hasattr(found, "aclose"):
            await found.aclose()


def _read(ledger: Ledger | None, found: Any) -> Any:
    """``found`` as its saver would give it without this library; ``ledger`` learns the rest."""
    left = found.pending_writes if found is not None else None
    if not left or not any(channel == CHANNEL for _, channel, _ in left):
        return found
    for _, channel, told in left:
        if ledger is not None and channel == CHANNEL:
            ledger.learn(found.config, told)
    return found._replace(pending_writes=[write for write in left if write[1] != CHANNEL])


def _notice(config: Any, found: Any) -> None:
    """A node goes on with what an earlier attempt left of a graph or of tasks inside it, or a graph
    there remembers earlier runs: who knows what a human has said to that, and what it depends on.
    What is made of it is not everybody's."""
    conf = config.get("configurable") or {}
    binding = conf.get(BINDING)
    left = found.pending_writes if found is not None else None
    if isinstance(binding, Binding) and any(channel == RETURN for _, channel, _ in left or ()):
        binding.continued = True
    namespace = str(conf.get("checkpoint_ns") or "")
    if namespace and (found is not None or NS_END not in namespace.rpartition(NS_SEP)[2]):
        taint(part_of(conf), "continued_inside")


def _delete_thread(self: Any, thread_id: str, *args: Any, **kwargs: Any) -> None:
    try:
        self._saver.delete_thread(thread_id, *args, **kwargs)
    finally:
        self.provenance.forget([thread_id])
        self._tell("forget", [thread_id])


async def _adelete_thread(self: Any, thread_id: str, *args: Any, **kwargs: Any) -> None:
    try:
        await self._saver.adelete_thread(thread_id, *args, **kwargs)
    finally:
        self.provenance.forget([thread_id])
        await self._atell("aforget", [thread_id])


def _delete_for_runs(self: Any, run_ids: Any, *args: Any, **kwargs: Any) -> None:
    run_ids, threads = list(run_ids), set()
    with suppress(Exception):  # a saver that cannot list them: then nothing is served all the same
        for run_id in run_ids:
            found = self._saver.list(None, filter={"run_id": run_id})
            threads |= {each.config["configurable"]["thread_id"] for each in found}
    try:
        self._saver.delete_for_runs(run_ids, *args, **kwargs)
    finally:
        self._tell("forget_runs", run_ids, sorted(threads))


async def _adelete_for_runs(self: Any, run_ids: Any, *args: Any, **kwargs: Any) -> None:
    run_ids, threads = list(run_ids), set()
    with suppress(Exception):
        for run_id in run_ids:
            found = self._saver.alist(None, filter={"run_id": run_id})
            threads |= {each.config["configurable"]["thread_id"] async for each in found}
    try:
        await self._saver.adelete_for_runs(run_ids, *args, **kwargs)
    finally:
        await self._atell("aforget_runs", run_ids, sorted(threads))


def _prune(self: Any, thread_ids: Any, *args: Any, **kwargs: Any) -> None:
    thread_ids = list(thread_ids)
    try:
        self._saver.prune(thread_ids, *args, **kwargs)
    finally:
        if _deletes(self._saver.prune, thread_ids, args, kwargs):
            self._tell("forget", thread_ids)


async def _aprune(self: Any, thread_ids: Any, *args: Any, **kwargs: Any) -> None:
    thread_ids = list(thread_ids)
    try:
        await self._saver.aprune(thread_ids, *args, **kwargs)
    finally:
        if _deletes(self._saver.aprune, thread_ids, args, kwargs):
            await self._atell("aforget", thread_ids)


def _copy_thread(
    self: Any, source_thread_id: str, target_thread_id: str, *args: Any, **kwargs: Any
) -> None:
    self._saver.copy_thread(source_thread_id, target_thread_id, *args, **kwargs)
    self._tell("copy", source_thread_id, target_thread_id)


async def _acopy_thread(
    self: Any, source_thread_id: str, target_thread_id: str, *args: Any, **kwargs: Any
) -> None:
    await self._saver.acopy_thread(source_thread_id, target_thread_id, *args, **kwargs)
    await self._atell("acopy", source_thread_id, target_thread_id)


def _with_allowlist(self: Any, *args: Any, **kwargs: Any) -> Any:
    inner = self._saver.with_allowlist(*args, **kwargs)
    if inner is self._saver:
        return self
    clone = copy.copy(self)
    clone.__dict__["_saver"] = inner
    return clone


def _deletes(prune: Callable[..., Any], threads: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of ``prune`` leaves nothing of the threads."""
    if "strategy" in kwargs:
        return bool(kwargs["strategy"] == "delete")  # also where it is one of **kwargs
    given = inspect.signature(prune).bind(threads, *args, **kwargs)
    given.apply_defaults()
    return given.arguments.get("strategy") == "delete"


_TELLING: dict[str, Callable[..., Any]] = {
    "put": _put,
    "aput": _aput,
    "put_writes": _put_writes,
    "aput_writes": _aput_writes,
    "list": _list,
    "alist": _alist,
    "get_tuple": _get_tuple,
    "aget_tuple": _aget_tuple,
    "delete_thread": _delete_thread,
    "adelete_thread": _adelete_thread,
    "delete_for_runs": _delete_for_runs,
    "adelete_for_runs": _adelete_for_runs,
    "prune": _prune,
    "aprune": _aprune,
    "copy_thread": _copy_thread,
    "acopy_thread": _acopy_thread,
    "with_allowlist": _with_allowlist,
}
_OPTIONAL = {
    "delete_for_runs": "for what the cache has of a thread graph.perf.forget_thread(thread_id)",
    "prune": "delete_thread(thread_id) for each thread",
    "copy_thread": "a new thread that begins with graph.get_state(config).values",
}
"""What not all savers can, and what there is instead."""
_OPTIONAL |= {f"a{name}": instead for name, instead in _OPTIONAL.items()}
_ENTERED = ("__enter__", "__exit__", "__aenter__", "__aexit__")


@functools.lru_cache(maxsize=256)
def _class_for(kind: Any) -> Any:
    members: dict[str, Any] = {
        # so that `isinstance` sees the saver that it stands for
        "__class__": property(lambda self: type(self.__dict__["_saver"])),
        "serde": property(
            lambda self: self.__dict__["_saver"].serde,
            lambda self, serde: setattr(self.__dict__["_saver"], "serde", serde),
        ),
    }
    for name in dir(BaseCheckpointSaver):
        own = getattr(kind, name, None)
        if name.startswith("__") or name == "serde" or own is getattr(BaseCheckpointSaver, name):
            continue
        if name in _TELLING:
            members[name] = _signed(_TELLING[name], own)
        else:
            members[name] = _handed_on(name)
    for name in _ENTERED:
        if hasattr(kind, name):
            members[name] = _entered(name)
    return type(kind.__name__, (_Bound, BaseCheckpointSaver), members)


def _cannot(saver: str, name: str, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        f"checkpointer: {saver} has no {name}(); accepted: a saver that has, or {_OPTIONAL[name]}"
    )


def _signed(method: Any, own: Any) -> Any:
    """A copy of ``method`` with the name and signature of ``own``: LangGraph looks at them."""
    made = types.FunctionType(method.__code__, method.__globals__, method.__name__)
    with suppress(ValueError, TypeError):  # it has none that can be told
        made.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return functools.update_wrapper(made, own)


def _entered(name: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        result = getattr(self.__dict__["_saver"], name)(*args)
        return self if result is self.__dict__["_saver"] else result

    return call
