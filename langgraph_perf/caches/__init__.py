"""Where results are kept: in memory, on disk, in Redis or Valkey, in tiers of them, or elsewhere.

``MemoryCache``, ``DiskCache``, ``RedisCache`` and ``TieredCache`` are imported from
``langgraph_perf``. For a backend of your own:

* ``base.Cache`` is what to subclass: it says what each method has to do, and brings LangGraph's
  ``BaseCache``, ``invalidate`` and the awaitable twins. ``base.TokenCache`` reads as well, on top
  of ``peek`` (entries) and ``peek_tags`` (tokens).
* ``base`` also has what the methods take and return (``Entry``, ``Lookup``, ``Lease``,
  ``CacheStats``) and what helps with it: ``servable`` decides whether an entry may be served,
  ``new_token`` makes tokens, ``namespace_tag`` is the tag that ``clear`` drops, ``pack`` and
  ``unpack`` turn entries into checked (and encrypted) bytes, ``key_digest`` names them.
* ``langgraph_perf.testing`` checks it.
* ``foreign.ForeignCache`` makes any other LangGraph ``BaseCache`` a store without tags; ``compile``
  does so by itself.
"""
