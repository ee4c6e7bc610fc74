"""From what a user gives ``RedisCache`` to connections with deadlines of their own.

Connections are made by redis-py, so TLS, passwords, databases, Unix sockets and Sentinel are what
it makes of them; but they are this cache's own, whatever the client was set to
(``decode_responses``, retries, no timeout).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from langgraph_perf.errors import ConfigurationError

_ACCEPTED = (
    "accepted: a URL (redis://, rediss://, unix://), or a client: redis.Redis, redis.RedisCluster, "
    "redis.asyncio.Redis"
)
_PLAIN_VALUES = (type(None), bool, int, float, type)
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
            # others, of a pool or a dict, say, may show a password
            what = repr(given) if isinstance(given, _PLAIN_VALUES) else type(given).__name__
            hint = " (of a Sentinel: sentinel.master_for(name))" if "Sentinel" in what else ""
            raise ConfigurationError(f"url_or_client: got {what:.200}; {_ACCEPTED}{hint}")

    def _from_url(self, url: str) -> None:
        scheme, colon, rest = url.partition("://")
        url = f"{_SCHEMES.get(scheme, scheme)}{colon}{rest}"
        try:
            pool = redis.ConnectionPool.from_url(url)
            apool = redis.asyncio.ConnectionPool.from_url(url)
        except (ValueError, TypeError) as exc:
            # what is no port may be a part of the password
            why = "the port is no number" if "Port could not be cast" in str(exc) else exc
            raise ConfigurationError(
                f"url_or_client: got the URL {_redacted(url)!r}: {why}; {_ACCEPTED}{_encoded(url)}"
            ) from None
        path = urlsplit(url).path
        if not url.startswith("unix:") and not re.fullmatch(r"/?\d*", path):
            raise ConfigurationError(
                f"url_or_client: got the URL {_redacted(url)!r}, in which no database number "
                f"follows the server; accepted: redis://user:password@host:port/0{_encoded(url)}"
            )
        known = _settings_of(pool.connection_class)
        for name in pool.connection_kwargs:
            if name not in known:
                near = get_close_matches(name, known, 1)
                raise ConfigurationError(
                    f"url_or_client: got the URL {_redacted(url)!r}, whose option {name!r} is "
                    f"unknown; accepted: {near[0] if near else ', '.join(sorted(known))} "
                    "(timeouts are better given to RedisCache)"
                )
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


def _settings_of(kind: Any) -> set[str]:
    """What connections of this class can be told."""
    return {
        name
        for each in kind.__mro__
        if each is not object
        for name, known in inspect.signature(each.__init__).parameters.items()
        if known.kind is known.POSITIONAL_OR_KEYWORD or known.kind is known.KEYWORD_ONLY
    } - {"self"}


def _redacted(url: str) -> str:
    """``url`` without its password, however malformed."""
    # a password that is not encoded may hold any of / @ ? #
    start, colon, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    if at:
        rest = f"{user.partition(':')[0]}:***@{place}" if ":" in user else f"***@{place}"
    before, mark, query = rest.partition("?")
    options = [
        option if _HARMLESS.search(option.partition("=")[0]) else f"{option.partition('=')[0]}=***"
        for option in query.split("&")
    ]
    return f"{start}{colon}{before}{mark}{'&'.join(options) if mark else ''}"


_HARMLESS = re.compile(r"time|^db$|^protocol$|^max_|^health")


def _encoded(url: str) -> str:
    if "@" not in url:
        return ""
    return "; in user and password / @ : ? # are percent-encoded (urllib.parse.quote(..., safe=''))"


_CUT = re.compile("closed|lost|reset by peer|broken pipe", re.IGNORECASE)
"""What is said of a connection that the other side has ended, whatever we were doing."""


def unusable(source: Source, exc: Exception) -> str:
    """What ``ping`` says of a server that answered, or did not, with ``exc``."""
    place, tls = "the cluster", False
    if source.connect is not None:
        one = source.connect()
        host, port = getattr(one, "host", None), getattr(one, "port", None)
        place = getattr(one, "path", None) or f"{host}:{port}"
        place = f"{place}, database {one.db}"
        if one.username:
            place += f", as user {one.username!r}"
        tls = isinstance(one, redis.SSLConnection)
    said = f"{type(exc).__name__}: {exc}"
    hint = ""
    if "HELLO must be called" in said or "NOAUTH" in said or "Authentication required" in said:
        hint = "; it wants a password, and was given none"
    elif "DB index" in said:
        hint = "; it has no such database"
    elif tls:
        hint = "; rediss:// is for servers that speak TLS: redis:// if this one does not"
    elif isinstance(exc, redis.ConnectionError) and _CUT.search(said):
        hint = "; what listens there is no Redis server, or one that speaks TLS (rediss://)"
    return (
        f"url_or_client: the server at {place} cannot be used: {said}{hint}; accepted: a Redis "
        "(6.2 or later) or Valkey server that can be reached, with its user and password"
    )
