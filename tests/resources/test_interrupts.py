"""Ctrl-C at every point at which Python can deliver it: nothing is lost, nothing stays shut."""

from __future__ import annotations

import gc
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from langgraph_perf.resources import Keyed, Pool, Resource, Shared

from .helpers import Maker, check_at_rest

Use = Callable[[Any], None]


def twice(pool: Any) -> None:
    """Two objects at once, then one of them again, and again."""
    with pool.lease(), pool.lease():
        pass
    for _ in range(2):
        with pool.lease():
            pass


def in_turn(models: Any) -> None:
    """Objects that make room for each other, and one leased twice."""
    for key in "aba":
        with models.lease(key), models.lease(key):
            pass


def all_together(shared: Any) -> None:
    """One object, leased twice."""
    for _ in range(2):
        with shared.lease(), shared.lease():
            pass


def plain(maker: Maker) -> Any:
    return Pool(maker.create, max_size=2, timeout=20, close=maker.close)


def cautious(maker: Maker) -> Any:
    answers = itertools.cycle([False, True])
    return Pool(
        maker.create,
        max_size=2,
        timeout=20,
        check=lambda thing: next(answers),
        reset=lambda thing: None,
        close=maker.close,
    )


def short_lived(maker: Maker) -> Any:
    return Pool(maker.create, max_size=2, timeout=20, max_lifetime=1e-9, close=maker.close)


def keyed(maker: Maker) -> Any:
    return Keyed(maker.create, max_size=1, timeout=20, close=maker.close)


def shared(maker: Maker) -> Any:
    return Shared(maker.create, timeout=20, close=maker.close)


def interrupted(use: Use, resource: Resource[Any], point: int) -> bool:
    """Use ``resource`` with Ctrl-C at its ``point``-th call; ``False`` if there are fewer."""
    points = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal points
        inside = "langgraph_perf/resources/" in frame.f_code.co_filename.replace("\\", "/")
        # what a finalizer raises is only printed, by Python itself
        if event in ("call", "c_return") and inside and frame.f_code.co_name != "__del__":
            points += 1
            if points == point:
                sys.setprofile(None)
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        use(resource)
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before)
    return False


@pytest.fixture(autouse=True)
def nothing_else_is_finalized() -> Iterator[None]:
    """Neither what other tests left is, nor does a collection come at a point of its own."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (plain, twice),
        (cautious, twice),
        (short_lived, twice),
        (keyed, in_turn),
        (shared, all_together),
    ],
    ids=lambda it: it.__name__,
)
def test_at_every_call(make: Callable[[Maker], Any], use: Use) -> None:
    """Whatever it interrupts, the next caller is served, and the numbers add up."""
    for point in itertools.count(1):
        maker = Maker()
        resource = make(maker)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # a lease may be lost and found
            if not interrupted(use, resource, point):
                assert point > 50
                break
            gc.collect(0)
        use(resource)
        check_at_rest(resource)
        assert maker.most_alive <= resource.max_size + 1, point
        resource.close()
        check_at_rest(resource)
