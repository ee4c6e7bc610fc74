"""What the package exports, and that importing it stays light."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import langgraph_perf
from langgraph_perf.perf import Perf


def test_the_exports() -> None:
    """Exactly these names, each with a docstring."""
    assert sorted(langgraph_perf.__all__) == [
        "CacheClosed",
        "CacheControl",
        "CacheMiss",
        "CachePolicy",
        "ConfigurationError",
        "DiskCache",
        "FromContext",
        "Keyed",
        "LangGraphPerfError",
        "LeaseError",
        "MemoryCache",
        "Pool",
        "PoolClosed",
        "PoolTimeout",
        "RedisCache",
        "ResourceError",
        "Shared",
        "StateGraph",
        "TieredCache",
        "TooManyWaiting",
        "Use",
        "alease",
        "get_cache",
        "lease",
    ]
    for name in langgraph_perf.__all__:
        assert getattr(langgraph_perf, name).__doc__


def test_nothing_is_offered_that_does_not_work() -> None:
    """What is planned has no field, method or name yet that could be used in vain."""
    assert "stream" not in {field.name for field in dataclasses.fields(langgraph_perf.CachePolicy)}
    with pytest.raises(langgraph_perf.ConfigurationError, match="stream"):
        langgraph_perf.CachePolicy(stream=True)  # type: ignore[call-arg]
    assert not hasattr(Perf, "explain")
    assert not hasattr(langgraph_perf, "OBSERVED")


def test_importing_it_imports_nothing_optional() -> None:
    """What is heavy or optional is imported only where it is used."""
    code = (
        "import sys, langgraph.graph; before = set(sys.modules); import langgraph_perf; "
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert not imported & {"numpy", "diskcache", "redis", "sqlalchemy", "matplotlib", "pickle"}


def test_star_import_without_redis() -> None:
    """Without the extra everything else can be imported, and asking for RedisCache says why not."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'redis' else real(name)\n"
        "from langgraph_perf import *\n"
        "assert DiskCache and 'RedisCache' not in dir()\n"
        "try:\n    from langgraph_perf import RedisCache\n"
        "except ImportError as exc:\n    assert 'langgraph-perf[redis]' in str(exc)\n"
        "    assert exc.__cause__ is None and exc.__suppress_context__\n"
        "else:\n    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
