"""One cached call, as pure steps: what to do next, never how.

``steps`` is a generator that yields what it needs (read this, wait for that, run the body) and is
sent the answer. It does no I/O, never blocks and has no clock but the cache's; the two drivers in
``_drive`` carry its steps out, one blocking, one awaiting, so that everything that decides is
written once. Model: ``hishel``'s states with a sync and an async cache around them.
"""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Generator
from typing import Any, Literal

from langgraph.errors import GraphBubbleUp

from langgraph_perf._flight import Disperse, Flight, Landed, TakeOver, Waiter
from langgraph_perf._gathering import Gathering, depends, taint
from langgraph_perf._steps import (
    Acquire,
    Call,
    Done,
    Join,
    Pause,
    Raised,
    Ran,
    Read,
    Release,
    Revalidate,
    Run,
    Step,
    Steps,
    Tokens,
    Verdict,
    Wait,
    Write,
)
from langgraph_perf.caches.base import Entry, Lease, timely
from langgraph_perf.codec import DecodeError, EncodeError
from langgraph_perf.errors import CacheMiss
from langgraph_perf.policy import shortest

logger = logging.getLogger("langgraph_perf")

FIRST_POLL = 0.005
LONGEST_POLL = 0.1
NOTIFIED = 1.0
"""Seconds between looks at the lease of another process; the last where the cache tells by itself
when there is something to see."""


def steps(call: Call) -> Steps:
    """The steps of one call; returns what the body did or what a stored entry made of it."""
    while True:
        if call.mode != "refresh" and not call.looked:
            served = yield from _stored(call, "hit")
            if served is not None:
                return served
        call.looked = False
        if call.mode == "only":
            call.counters.miss()
            return Raised(CacheMiss(call.name))
        if call.mode == "refresh":
            call.backend.flights.supersede(call.key)
            done, _ = yield from _compute(call, None, None)
            return done

        flight, waiter = yield Join(call.key)
        if waiter is None:
            return (yield from _lead(call, flight))
        outcome = yield from _follow(call, flight, waiter)
        if isinstance(outcome, Ran):
            return outcome
        if outcome == "lead":
            return (yield from _lead(call, flight, took_over=True))
        if outcome == "alone":
            return (yield from _lead(call, None))


def _stored(call: Call, how: Literal["hit", "coalesced"]) -> Generator[Step, Any, Ran | None]:
    if call.unreadable:
        return None
    entry = yield from _freshest(call)
    if entry is None:
        return None
    state = call.state(entry)
    if state == "fresh":
        return load(call, entry, how)
    freshness = call.freshness
    if state != "revalidate" or freshness is None or freshness.revalidate is None:
        return None
    served = load(call, entry, "stale")
    if served is not None and call.mode != "only":
        yield Revalidate(call, freshness.revalidate)
    return served


def _freshest(call: Call) -> Generator[Step, Any, Entry | None]:
    """What is stored; a fresh result in a lower tier rather than a stale one in an upper."""
    entry: Entry | None = yield Read(call.lookup)
    freshness = call.freshness
    if entry is None or freshness is None or not call.backend.cache.layered:
        return entry
    if call.state(entry) == "fresh":
        return entry
    limit = shortest(call.max_age, freshness.ttl)
    fresh = yield Read(call.lookup._replace(max_age=limit, fresh=True))
    return fresh or entry


How = Literal["hit", "stale", "fallback", "coalesced"]


def load(call: Call, entry: Entry, how: How) -> Ran | None:
    """Answer ``call`` with ``entry``, and count it; ``None`` if it cannot be read back."""
    try:
        value = call.load(entry.payload)
    except DecodeError as exc:
        call.unreadable = True
        if call.counters.refused("undecodable"):
            logger.warning("%s: a stored result is not served: %s", call.name, exc)
        return None
    depends(call.around, call.backend, entry.deps, call.scope)
    if how in ("stale", "fallback"):
        taint(call.around, "stale_inside")  # what is made of it would be served as fresh
    if how == "hit":
        call.counters.hit(entry.seconds, entry.tokens)
    elif how == "stale":
        call.counters.stale_hit(entry.seconds, entry.tokens)
    elif how == "fallback":
        call.counters.stale_hit(0.0, 0)  # running it cost what it did: nothing was saved
    else:
        call.counters.coalesced(entry.seconds, entry.tokens)
    call.on_hit(entry)
    return Ran(value, entry=entry)


def _follow(
    call: Call, flight: Flight, waiter: Waiter
) -> Generator[Step, Any, Ran | Literal["again", "alone", "lead"]]:
    flights = call.backend.flights
    try:
        outcome = yield Wait(waiter)
    except BaseException:
        flights.left(flight, waiter)
        raise
    finally:
        flights.unblocked(flight, call.held)
    if outcome is None:
        flights.left(flight, waiter)
        return "alone"
    if isinstance(outcome, TakeOver):
        return "lead"
    if isinstance(outcome, Disperse):
        return "alone"
    assert isinstance(outcome, Landed)
    entry = outcome.entry
    if entry.deps:
        # the leader may have begun before an invalidation that this call began after
        current = yield Tokens(tuple(tag for tag, _ in entry.deps))
        if current is None:
            return "alone"
        if current != tuple(token for _, token in entry.deps):
            return "again"
    state = call.state(entry)
    if state == "over" or not timely(entry, call.lookup, call.backend.cache.clock()):
        return "alone"  # the leader takes older results than this call does
    return load(call, entry, "coalesced" if state == "fresh" else "stale") or "alone"


def _lead(call: Call, flight: Flight | None, *, took_over: bool = False) -> Steps:
    """Compute as the leader of ``flight``, which ends here, once and whatever happens."""
    if flight is None:
        done, _ = yield from _compute(call, None, None)
        return (yield from _or_stale(call, done)) or done
    verdict: Verdict = "abandon"
    try:
        leased = call.backend.cache.shared
        if not (took_over or leased):
            # the last leader may have stored its result between our look and our joining
            served = yield from _stored(call, "hit")
            if served is not None:
                verdict = served.entry or verdict
                return served
        lease: Lease | None = None
        if leased:
            taken = yield from _lease(call)
            if isinstance(taken, Ran):
                verdict = taken.entry or verdict
                return taken
            lease = taken
        done, verdict = yield from _compute(call, flight, lease)
        stale = yield from _or_stale(call, done)
        if stale is not None:
            verdict = stale.entry or verdict
            return stale
        return done
    finally:
        _end(call, flight, verdict)


def _end(call: Call, flight: Flight, verdict: Verdict) -> None:
    flights = call.backend.flights
    if isinstance(verdict, Entry):
        flights.landed(flight, verdict)
    elif verdict == "disperse":
        flights.disperse(flight)
    else:
        flights.abandoned(flight)


def _or_stale(call: Call, done: Done) -> Generator[Step, Any, Ran | None]:
    """What may be served in the place of an error."""
    if not (isinstance(done, Raised) and call.freshness and call.freshness.if_error):
        return None
    # questions to humans, commands to parents and cancellation are no failures
    if isinstance(done.error, GraphBubbleUp) or not isinstance(done.error, Exception):
        return None
    if done.streamed or call.freshness.retried(done.error):
        return None
    entry = yield from _freshest(call)
    if entry is None or call.state(entry) == "over":
        return None
    if call.state(entry) == "fresh":
        return load(call, entry, "coalesced")
    if call.counters.refused("run_failed"):
        logger.warning(
            "node %r: a stale result is served because running it failed (logged once): %r",
            call.name,
            done.error,
        )
    return load(call, entry, "fallback")


def revalidation(call: Call) -> Steps:
    """The steps of one run in the background, unless another process is at it already.

    It leads no flight: who has nothing to serve does not wait for it, but runs.
    """
    background = call.backend.background
    lease: Lease | None = None
    if call.backend.cache.shared:
        taken = yield Acquire(call.key)
        if taken == "busy":
            return Ran(None)
        lease = None if taken == "failed" else taken
    entry: Entry | None = None
    try:
        entry = yield from _freshest(call)
        if entry is not None and call.state(entry) != "fresh":
            entry = None
    finally:
        if lease is not None and (entry is not None or sys.exc_info()[0] is not None):
            yield from _release(lease)
    if entry is not None:
        return Ran(None)
    if lease is not None:
        background[call.key] = lease
    try:
        done, _ = yield from _compute(call, None, lease)
    finally:
        if background.get(call.key) == lease:
            background.pop(call.key, None)
    return done


def _lease(call: Call) -> Generator[Step, Any, Lease | Ran | None]:
    """The lease of the key, or the result that another process stored meanwhile.

    What is part of another call does not wait for ever: another process may hold this key's lease
    and wait for the other call's.
    """
    patience = call.backend.cache.lease_seconds if call.held else math.inf
    pause = NOTIFIED if call.backend.cache.notifies else FIRST_POLL
    longest = max(pause, LONGEST_POLL)
    while True:
        taken = yield Acquire(call.key)
        if taken == "failed":
            return None
        busy = taken == "busy"
        refreshing = call.backend.background.pop(call.key, None) if busy else None
        if refreshing is not None:
            yield Release(refreshing)  # nobody waits for what runs in the background
            continue
        if busy:
            if patience <= 0:
                return None
            yield Pause(call.key, pause)
            patience -= pause
            pause = min(pause * 1.5, longest)
        served: Ran | None = None
        try:
            served = yield from _stored(call, "coalesced" if busy else "hit")
        finally:
            if not busy and (served is not None or sys.exc_info()[0] is not None):
                yield from _release(taken)
        if served is not None:
            return served
        if not busy:
            return taken  # type: ignore[no-any-return]


def _compute(
    call: Call, flight: Flight | None, lease: Lease | None
) -> Generator[Step, Any, tuple[Done, Verdict]]:
    """Run the body and store what it returns."""
    if call.mode != "refresh":
        call.counters.miss()
    try:
        tags = (*call.tags, *call.marks)
        deps = None if call.owner is None else call.owner.known(call.backend, tags)
        if deps is None:
            # taken before the body reads anything: an invalidation from here on must count
            tokens = (yield Tokens(tags)) if tags else ()
            deps = None if tokens is None else tuple(zip(tags, tokens, strict=True))
            if deps is not None and call.owner is not None:
                deps = call.owner.pinned(call.backend, deps)
        gathering = Gathering(call.backend, call.scope)
        done = yield Run(flight, lease, gathering)
        if isinstance(done, Raised):
            # a question to a human answers nobody else: let all who wait ask their own
            asks = isinstance(done.error, GraphBubbleUp)
            return done, "disperse" if asks else "abandon"
        spent = call.spent(done.value)
        call.counters.ran(done.seconds, spent)
        if deps is not None:
            deps = tuple({**gathering.deps, **dict(deps)}.items())
            depends(call.around, call.backend, deps, call.scope)
        done.tainted = done.tainted or gathering.tainted
        if gathering.elsewhere:
            done.tainted = done.tainted or "tags_elsewhere"
        elif flight is not None and flight.superseded:
            done.tainted = done.tainted or "superseded"
        entry = _entry(call, done, deps, spent)
        if entry is None:
            return done, "disperse"
        if call.background:
            newer = yield from _freshest(call)
            if newer is not None and newer.created > entry.created - done.seconds:
                call.counters.refused("superseded")
                return done, "disperse"
        if (yield Write(call.key, entry, lease)):
            lease = None  # the write gave it back
        else:
            call.counters.refused("not_written")
        return done, entry
    finally:
        if lease is not None:
            yield from _release(lease)


def _release(lease: Lease) -> Generator[Step, Any, None]:
    """Give a lease back; one whose event loop is gone for good runs out by itself."""
    if sys.exc_info()[0] is not GeneratorExit:
        yield Release(lease)


def _entry(
    call: Call, ran: Ran, deps: tuple[tuple[str, str], ...] | None, spent: int
) -> Entry | None:
    """What to store, or ``None`` with the reason counted."""
    reason = ran.tainted or ("tags_unavailable" if deps is None else call.refuse(ran.value))
    if reason is not None:
        call.counters.refused(reason)
        return None
    try:
        payload = call.dump(ran.value)
    except EncodeError as exc:
        if call.counters.refused("unserializable"):
            logger.warning("%s: the result is not stored: %s", call.name, exc)
        return None
    created = call.backend.cache.clock()
    expires = None
    if call.ttl is not None:
        # earlier, never later: ``ttl`` is the longest a result may be served
        expires = created + call.ttl * (1 - call.jitter * random.random()) + call.grace
    return Entry(payload, created, expires, deps or (), ran.seconds, spent, call.grace)
