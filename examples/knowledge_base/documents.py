"""The data the nodes read: documents with full-text search, and one profile per user.

A ``KnowledgeBase`` is made of a leased connection, used, and forgotten. SQLite and PostgreSQL
differ in their schema and in how they search; everything else is the same SQL.
"""

from __future__ import annotations

import json
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any, ClassVar

EXCERPT_WORDS = 64  # the most that SQLite's snippet() gives
EXCERPT_CHARS = 400  # tables are long however few their words, and the model is small
QUESTION_WORDS = re.compile(  # says nothing about the topic, and none of it is Python syntax
    r"\b(a|an|are|can|do|does|happens|how|i|it|of|the|to|used|what|when|which|why)\b", re.I
)
EDITED = "\n\nEdited: revision "
PROFILES = {
    "alice": (("context-managers", "with"), "brief"),
    "bob": (("exceptions", "try"), "detailed"),
}


@dataclass(frozen=True)
class Document:
    """One document. ``revision`` counts its changes, so ``(id, revision)`` names this very text."""

    id: str
    revision: int
    text: str


@dataclass(frozen=True)
class Profile:
    """What is known about a user: topics to prefer, and how long an answer should be."""

    topics: tuple[str, ...] = ()
    style: str = "brief"


def knowledge_base(db: Any) -> KnowledgeBase:
    """The knowledge base behind a connection of sqlite3 or psycopg."""
    return (
        SqliteKnowledgeBase(db) if isinstance(db, sqlite3.Connection) else PostgresKnowledgeBase(db)
    )


class KnowledgeBase(ABC):
    """Documents and users behind a connection that somebody else opens and closes."""

    SCHEMA: ClassVar[Sequence[str]]

    def __init__(self, db: Any) -> None:
        self._db = db

    @abstractmethod
    def _exists(self) -> bool:
        """Whether the tables are there."""

    @abstractmethod
    def _search(self, words: list[str], limit: int) -> Any:
        """Rows of (id, revision, excerpt) of the documents with any of these words."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[Any]:
        """All of the block or nothing."""

    def _run(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values)

    def seed(self) -> bool:
        """Create and fill the tables where there are none; says whether it did."""
        if self._exists():
            return False
        with self._transaction():
            for statement in self.SCHEMA:
                self._db.execute(statement)
            for name, text in topics.items():
                self._run("INSERT INTO documents (id, revision, text) VALUES (?, 1, ?)", name, text)
            for user, (prefer, style) in PROFILES.items():
                self._write_profile(user, Profile(prefer, style))
        return True

    def search(self, query: str, limit: int = 8) -> list[Document]:
        """The best lexical matches of a question, best first; ``text`` is an excerpt."""
        words = re.findall(r"\w+", QUESTION_WORDS.sub(" ", query))
        return [Document(*row) for row in self._search(words, limit)] if words else []

    def read(self, ids: Sequence[str]) -> list[Document]:
        """The documents of these ids in full; ids that do not exist are left out."""
        if not ids:
            return []
        marks = ", ".join("?" * len(ids))
        rows = self._run(f"SELECT id, revision, text FROM documents WHERE id IN ({marks})", *ids)
        return [Document(*row) for row in rows]

    def profile(self, user_id: str) -> Profile:
        """A user's profile; the default one for a user who has none."""
        row = self._run("SELECT topics, style FROM users WHERE id = ?", user_id).fetchone()
        return Profile(tuple(json.loads(row[0])), row[1]) if row else Profile()

    def edit(self, document_id: str) -> int:
        """Change a document's text; returns its new revision."""
        (document,) = self.read([document_id])
        revision = document.revision + 1
        text = f"{document.text.partition(EDITED)[0]}{EDITED}{revision}."
        with self._transaction():
            update = "UPDATE documents SET text = ?, revision = ? WHERE id = ?"
            self._run(update, text, revision, document_id)
        return revision

    def set_style(self, user_id: str, style: str) -> None:
        """Change how a user wants to be answered: ``"brief"`` or ``"detailed"``."""
        with self._transaction():
            self._write_profile(user_id, Profile(self.profile(user_id).topics, style))

    def _write_profile(self, user_id: str, profile: Profile) -> None:
        self._run(
            "INSERT INTO users (id, topics, style) VALUES (?, ?, ?) ON CONFLICT (id)"
            " DO UPDATE SET topics = excluded.topics, style = excluded.style",
            *(user_id, json.dumps(profile.topics), profile.style),
        )


USERS_TABLE = "CREATE TABLE users (id TEXT PRIMARY KEY, topics TEXT NOT NULL, style TEXT NOT NULL)"


class SqliteKnowledgeBase(KnowledgeBase):
    """The tables in one SQLite file."""

    SCHEMA = (
        "CREATE VIRTUAL TABLE documents"
        " USING fts5(id, text, revision UNINDEXED, tokenize='porter')",
        USERS_TABLE,
    )

    def _exists(self) -> bool:
        found = self._run("SELECT 1 FROM sqlite_master WHERE name = 'documents'")
        return found.fetchone() is not None

    def _search(self, words: list[str], limit: int) -> Any:
        return self._run(
            "SELECT id, revision, substr(snippet(documents, 1, '', '', '…', ?), 1, ?)"
            " FROM documents WHERE documents MATCH ? ORDER BY bm25(documents, 4.0, 1.0) LIMIT ?",
            *(EXCERPT_WORDS, EXCERPT_CHARS, " OR ".join(f'"{word}"' for word in words), limit),
        )

    def _transaction(self) -> AbstractContextManager[Any]:
        return self._db  # type: ignore[no-any-return]  # commits, or rolls back on an error


class PostgresKnowledgeBase(KnowledgeBase):
    """The tables in one schema of a PostgreSQL database, the first of the search path."""

    SCHEMA = (
        # PostgreSQL's own "english" drops words such as "with", which Python is made of
        "CREATE TEXT SEARCH DICTIONARY words (TEMPLATE = snowball, LANGUAGE = english)",
        "CREATE TEXT SEARCH CONFIGURATION words (COPY = pg_catalog.english)",
        "ALTER TEXT SEARCH CONFIGURATION words ALTER MAPPING"
        " FOR asciiword, word, asciihword, hword, hword_asciipart, hword_part WITH words",
        "CREATE TABLE documents (id TEXT PRIMARY KEY, revision INT NOT NULL, text TEXT NOT NULL,"
        " search TSVECTOR GENERATED ALWAYS AS"
        " (setweight(to_tsvector('words', id), 'A') || to_tsvector('words', text)) STORED)",
        "CREATE INDEX ON documents USING gin (search)",
        USERS_TABLE,
    )

    def _run(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql.replace("?", "%s"), values)

    def _exists(self) -> bool:
        row = self._run("SELECT to_regclass('documents') IS NOT NULL").fetchone()
        return bool(row[0])

    def _search(self, words: list[str], limit: int) -> Any:
        shown = (
            f"StartSel=, StopSel=, MaxFragments=1, MaxWords={EXCERPT_WORDS},"
            f" MinWords={EXCERPT_WORDS // 2}"
        )
        # the best are picked first: making excerpts is slow
        return self._run(
            "WITH best AS (SELECT id, revision, text, query, ts_rank(search, query, 1) AS rank"
            " FROM documents, to_tsquery('words', ?) query WHERE search @@ query"
            " ORDER BY rank DESC, id LIMIT ?)"
            " SELECT id, revision, left(ts_headline('words', text, query, ?), ?)"
            " FROM best ORDER BY rank DESC, id",
            *(" | ".join(f"'{word}'" for word in words), limit, shown, EXCERPT_CHARS),
        )

    def _transaction(self) -> AbstractContextManager[Any]:
        return self._db.transaction()  # type: ignore[no-any-return]
