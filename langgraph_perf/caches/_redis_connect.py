"""From what a user gives ``RedisCache`` to connections with deadlines of their own.

Connections are made by redis-py, so TLS, passwords, databases, Unix sockets and Sentinel are what
it makes of them; but they are this cache's own, whatever the client was set to
(``decode_responses``, retries, no timeout).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from langgraph_perf.errors import ConfigurationError

try:
    import redis
    import redis.asyncio
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ModuleNotFoundError as exc:  # pragma: no cover - tested in a process without it
    if exc.name != "redis":
        raise
    raise ImportError(
        "RedisCache needs the redis package: pip install 'langgraph-perf[redis]'"
    ) from None

_ACCEPTED = (
    "accepted: a URL (redis://, rediss://, unix://), or a client: redis.Redis, redis.RedisCluster, "
    "redis.asyncio.Redis"
)
_SCHEMES = {"valkey": "redis", "valkeys": "rediss"}
_PLAIN = {
    redis.Connection: redis.asyncio.Connection,
    redis.SSLConnection: redis.asyncio.SSLConnection,
    redis.UnixDomainSocketConnection: redis.asyncio.UnixDomainSocketConnection,
}
"""The connections that exist blocking and awaiting, and what of their settings both know:"""
_SETTINGS = re.compile(
    r"(host|port|db|path|username|password|client_name|credential_provider|protocol"
    r"|socket_keepalive|socket_keepalive_options|ssl_\w+)$"
)


class Source:
    """Where connections come from.

    Attributes:
        connect: makes a blocking connection, not yet connected.
        aconnect: makes an awaiting one; ``None`` when only blocking ones can be made.
        cluster: the client of a cluster, which has its own connections.
    """

    def __init__(self, given: object, timeout: float, connect_timeout: float) -> None:
        self.connect: Callable[[], Any] | None = None
        self.aconnect: Callable[[], Any] | None = None
        self.cluster: Any = None
        self._times = (timeout, connect_timeout)
        if isinstance(given, str):
            self._from_url(given)
        elif isinstance(given, redis.Redis):
            self._from_client(given)
        elif isinstance(given, redis.asyncio.Redis):
            self._from_async_client(given)
        elif isinstance(given, redis.RedisCluster):
            if given.encoder.decode_responses:
                raise ConfigurationError(
                    "url_or_client: got a RedisCluster with decode_responses=True, which cannot "
                    "read back what is stored; accepted: one without it"
                )
            self.cluster = given
        elif isinstance(given, redis.asyncio.RedisCluster):
            raise ConfigurationError(
                "url_or_client: got a redis.asyncio.RedisCluster, which works on one event loop "
                "only; accepted: a redis.RedisCluster, which serves sync and async graphs"
            )
        else:
            raise ConfigurationError(f"url_or_client: got {given!r}; {_ACCEPTED}")

    def _from_url(self, url: str) -> None:
        scheme, colon, rest = url.partition("://")
        url = f"{_SCHEMES.get(scheme, scheme)}{colon}{rest}"
        try:
            pool = redis.ConnectionPool.from_url(url)
            apool = redis.asyncio.ConnectionPool.from_url(url)
        except (ValueError, TypeError) as exc:
            raise ConfigurationError(
                f"url_or_client: got the URL {_redacted(url)!r}: {exc}; {_ACCEPTED}"
            ) from None
        self.connect = self._maker(pool.connection_class, pool.connection_kwargs, Retry)
        self.aconnect = self._maker(apool.connection_class, apool.connection_kwargs, AsyncRetry)

    def _from_client(self, client: Any) -> None:
        pool = client.connection_pool
        self.connect = self._maker(pool.connection_class, pool.connection_kwargs, Retry)
        # of Sentinel's and other special connections there is no awaiting twin
        twin = _PLAIN.get(pool.connection_class)
        settings = _common(pool.connection_kwargs, twin) if twin is not None else None
        if settings is not None:
            self.aconnect = self._maker(twin, settings, AsyncRetry)

    def _from_async_client(self, client: Any) -> None:
        pool = client.connection_pool
        twin = {b: a for a, b in _PLAIN.items()}.get(pool.connection_class)
        settings = _common(pool.connection_kwargs, twin) if twin is not None else None
        if settings is None:
            raise ConfigurationError(
                f"url_or_client: got an async client with {pool.connection_class.__name__}, which "
                "has no blocking counterpart for sync graphs; accepted: the sync client of the "
                "same server (redis.sentinel.Sentinel(...).master_for(name), say)"
            )
        self.connect = self._maker(twin, settings, Retry)
        self.aconnect = self._maker(pool.connection_class, pool.connection_kwargs, AsyncRetry)

    def _maker(self, kind: Any, settings: dict[str, Any], retry: Any) -> Callable[[], Any]:
        def make() -> Any:
            connection = kind(**settings)
            connection.socket_timeout, connection.socket_connect_timeout = self._times
            connection.retry = retry(NoBackoff(), 0)
            connection.health_check_interval = 0
            return connection

        try:
            make()  # what it refuses, it refuses now
        except Exception as exc:
            raise ConfigurationError(f"url_or_client: {type(exc).__name__}: {exc}") from None
        return make


def _common(settings: dict[str, Any], twin: Any) -> dict[str, Any] | None:
    """Those of ``settings`` that are the same for ``twin``; ``None`` if that would change what they
    ask of TLS."""
    known = inspect.signature(twin).parameters
    shared: dict[str, Any] = {}
    for name, value in settings.items():
        if name.startswith("ssl_") and name not in known:
            if value:
                return None
        elif _SETTINGS.match(name):
            shared[name] = value
    return shared


def _redacted(url: str) -> str:
    """``url`` without its password, however malformed."""
    return re.sub(r"(?<=:)[^/@]*@", "***@", url.partition("?")[0])
