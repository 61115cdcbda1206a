"""The guides are true: their blocks run in order in one folder, and print what they say they print.

A fence's language says what happens to it: `python` and `bash` run, `text` is what the block before it printed, a
fence with a title is a file, `sh` and others are for reading only.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
PAGES = (
    "index",
    "train",
    "export",
    "generate",
    "engine",
    "serve",
    "replicas",
    "hub",
    "demo",
    "simulate",
    "cli",
    "bank-format",
    "errors",
)
MADE = {"compatibility"}  # by the tests; it shows nothing to run
NOT_RUN = {"quantised"}  # needs quantisers, which the environment does not have (make quantised)
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(page: str):
    """Line, language, title and text of a page's fences."""
    text = (GUIDES / f"{page}.md").read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent, language, options, body = match.groups()
        title = re.search(r'title="([^"]+)"', options)
        lines = [line.removeprefix(indent) for line in body.split("\n")]
        yield text[: match.start()].count("\n") + 1, language, title and title[1], "\n".join(lines)


def trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def run_python(source: str, names: dict, where: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, where, "exec"), names)
    # `print(...)  # what it prints`
    expected = [line.split("  # ", 1)[1] for line in source.split("\n") if re.match(r"\s*print\(.*  # ", line)]
    if expected:
        assert trimmed(printed.getvalue()) == [line.strip() for line in expected], where
    return printed.getvalue()


def run_bash(source: str, where: str) -> str:
    done = subprocess.run(["bash", "-ec", source], capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.early
def test_the_guides_run_as_written(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    wrong = []
    for page in PAGES:
        wrong += run_page(page, tmp_path, monkeypatch)
    assert not wrong, "\n".join(wrong)


def run_page(page: str, folder: Path, monkeypatch) -> list[str]:
    """Runs a page's blocks; lists the outputs that are not as shown."""
    names: dict = {"__name__": "__main__"}
    printed = None
    wrong = []
    with surroundings(page, folder, monkeypatch):
        for line, language, title, body in blocks(page):
            where = f"{page}.md:{line}"
            if title:
                Path(title).parent.mkdir(parents=True, exist_ok=True)
                Path(title).write_text(body, encoding="utf-8")
                printed = None
            elif language == "python":
                printed = run_python(body, names, where)
            elif language == "bash":
                printed = run_bash(body, where)
            elif language == "text" and printed is not None:
                if trimmed(body) != trimmed(printed):
                    wrong.append(f"{where} should show:\n{printed}")
                printed = None
            else:
                printed = None
    return wrong


@contextlib.contextmanager
def surroundings(page: str, folder: Path, monkeypatch):
    """The guide to the Hub talks to one on loopback, which is what it shows; the others to none."""
    if page != "hub":
        yield
        return
    home = folder / "home-of-hub"
    with LoopbackHub() as hub, hub.here(monkeypatch, home), monkeypatch.context() as patch:
        for name, value in hub.environment(home).items():
            patch.setenv(name, value)
        yield


def test_every_guide_is_run():
    assert {path.stem for path in GUIDES.glob("*.md")} == {*PAGES, *MADE, *NOT_RUN}
