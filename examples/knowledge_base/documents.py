"""The data the nodes read: documents with full-text search, and one profile per user."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

EXCERPT_TOKENS = 64  # the most that SQLite's snippet() gives
EXCERPT_CHARS = 400  # tables are long however few their words, and the model is small
QUESTION_WORDS = re.compile(  # says nothing about the topic, and none of it is Python syntax
    r"\b(a|an|are|can|do|does|happens|how|i|it|of|the|to|used|what|when|which|why)\b", re.I
)
EDITED = "\n\nEdited: revision "
SCHEMA = """
CREATE VIRTUAL TABLE documents USING fts5(id, text, revision UNINDEXED, tokenize='porter');
CREATE TABLE users (id TEXT PRIMARY KEY, topics TEXT NOT NULL, style TEXT NOT NULL);
"""
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


@dataclass(frozen=True)
class KnowledgeBase:
    """Documents and users in one SQLite file.

    A value, not a connection: every call opens its own, so nodes on any thread may share one, and
    what a node is bound to (the path) can be part of its cache key.
    """

    path: Path

    def seed(self) -> bool:
        """Create and fill the file where there is none; says whether it did."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as db:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'documents'").fetchone():
                return False
            db.executescript(SCHEMA)
            db.executemany("INSERT INTO documents VALUES (?, ?, 1)", topics.items())
            db.executemany(
                "INSERT INTO users VALUES (?, ?, ?)",
                [(user, json.dumps(prefer), style) for user, (prefer, style) in PROFILES.items()],
            )
        return True

    def search(self, query: str, limit: int = 8) -> list[Document]:
        """The best lexical matches of a question, best first; ``text`` is an excerpt."""
        words = re.findall(r"\w+", QUESTION_WORDS.sub(" ", query))
        if not words:
            return []
        with self._connection() as db:
            rows = db.execute(
                "SELECT id, revision, substr(snippet(documents, 1, '', '', '…', ?), 1, ?)"
                " FROM documents WHERE documents MATCH ?"
                " ORDER BY bm25(documents, 4.0, 1.0) LIMIT ?",
                (EXCERPT_TOKENS, EXCERPT_CHARS, " OR ".join(f'"{word}"' for word in words), limit),
            )
            return [Document(*row) for row in rows]

    def read(self, ids: Sequence[str]) -> list[Document]:
        """The documents of these ids in full; ids that do not exist are left out."""
        with self._connection() as db:
            rows = db.execute(
                "SELECT id, revision, text FROM documents"
                " WHERE id IN (SELECT value FROM json_each(?))",
                (json.dumps(ids),),
            )
            return [Document(*row) for row in rows]

    def profile(self, user_id: str) -> Profile:
        """A user's profile; the default one for a user who has none."""
        with self._connection() as db:
            row = db.execute("SELECT topics, style FROM users WHERE id = ?", (user_id,)).fetchone()
        return Profile(tuple(json.loads(row[0])), row[1]) if row else Profile()

    def edit(self, document_id: str) -> int:
        """Change a document's text; returns its new revision."""
        (document,) = self.read([document_id])
        revision = document.revision + 1
        text = f"{document.text.partition(EDITED)[0]}{EDITED}{revision}."
        with self._connection() as db:
            db.execute(
                "UPDATE documents SET text = ?, revision = ? WHERE id = ?",
                (text, revision, document_id),
            )
        return revision

    def set_style(self, user_id: str, style: str) -> None:
        """Change how a user wants to be answered: ``"brief"`` or ``"detailed"``."""
        prefer = json.dumps(self.profile(user_id).topics)
        with self._connection() as db:
            db.execute("INSERT OR REPLACE INTO users VALUES (?, ?, ?)", (user_id, prefer, style))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path)
        try:
            with db:  # commits, or rolls back on an error
                yield db
        finally:
            db.close()
