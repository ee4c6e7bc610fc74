"""The README shows only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All Python blocks, in order, as one program."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    scope: dict[str, object] = {"__name__": "readme"}
    exec(compile("\n".join(blocks), "README.md", "exec"), scope)
    # cold, after the invalidation, and refreshed; not warm
    assert capsys.readouterr().out.count("asking the model") == 3
    scope["graph"].cache.close()  # type: ignore[attr-defined]


def test_its_commands_are_targets() -> None:
    """Every ``make`` command that it names exists, and CI runs the test command."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", readme, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()
