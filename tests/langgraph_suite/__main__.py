"""``make test-langgraph``: LangGraph's own test suite, with this library's ``StateGraph``.

The suite comes with LangGraph's source distribution; the one of the installed version is fetched
once into ``.cache``. It runs twice, see ``perf_plugin``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / ".cache" / "langgraph-suite"

TESTS_FAILED = 1  # pytest's exit code

# Tests of LangGraph's own cache that another cache cannot pass.
KNOWN = {
    # They look for ``__metadata__: {"cached": True}``, which LangGraph's cache puts into the update
    # of a node that it skips. No extension point lets a node say that of itself.
    "plain": [
        f"tests/{module}.py::test_in_one_fan_out_state_graph_waiting_edge_multiple[{cache}-True]"
        for module in ("test_pregel", "test_pregel_async")
        for cache in ("sqlite", "memory")
    ],
    # They count what is stored, and with a policy on every node more is.
    "wrapped": [
        "tests/test_delta_channel_node_cache.py::"
        f"test_a_cache_hit_saves_its_writes_without_caching_them_again{suffix}[{durability}]"
        for suffix in ("", "_async")
        for durability in ("sync", "async", "exit")
    ],
}


def fetch() -> Path:
    """The suite's folder."""
    number = version("langgraph")
    target = CACHE / number
    if not (target / "tests").exists():
        print(f"fetching the tests of langgraph {number} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--no-binary", "langgraph", "--dest", folder, f"langgraph=={number}"]
            subprocess.run(pip, check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                root = f"langgraph-{number}/"
                wanted = (root + "tests/", root + "pyproject.toml")
                members = [m for m in archive.getmembers() if m.name.startswith(wanted)]
                archive.extractall(folder, members=members, filter="data")
            target.parent.mkdir(parents=True, exist_ok=True)
            # only the whole folder counts as fetched
            subprocess.run(["cp", "-r", f"{folder}/langgraph-{number}", str(target)], check=True)
    return target


def main() -> int:
    """Run the suite in both ways, or in the one named; returns pytest's first bad exit code."""
    suite = fetch()
    modes = [mode for mode in ("plain", "wrapped") if mode in sys.argv[1:]]
    for mode in modes or ("plain", "wrapped"):
        print(f"\nLangGraph's suite, {mode}:", flush=True)
        environment = {
            **os.environ,
            "PERF_SUITE": mode,
            "NO_DOCKER": "true",
            "PYTHONPATH": str(HERE),
        }
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "perf_plugin"]
            command += ["-p", "no:asyncio", "-o", f"cache_dir={cache}", "--tb=short"]
            command += ["--ignore=tests/example_app", "-W", "default"]
            for test in KNOWN["plain"] + (KNOWN["wrapped"] if mode == "wrapped" else []):
                command += ["--deselect", test]
            command += [argument for argument in sys.argv[1:] if argument not in modes]
            # most of its tests wait for most of their time
            done = subprocess.run([*command, "-n", "5"], cwd=suite, env=environment)
            if done.returncode == TESTS_FAILED:
                # some of its tests count on a machine that has nothing else to do
                print("\nthose that failed, once more and alone:", flush=True)
                done = subprocess.run([*command, "--last-failed"], cwd=suite, env=environment)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
