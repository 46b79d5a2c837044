"""What the documents say exists: commands with their options, make targets, links, file names, recipes, examples.

A `bash` block also runs (tests/e2e/test_readme.py); an `sh` block is only shown.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fullweight.cli.main import app
from fullweight.core.config import apply_overrides, read_toml
from fullweight.train.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SHELL_WORDS = {"cd", "echo", "export", "mkdir", "git", "torchrun"}
# Commands inside prose, such as `fullweight bench model`; not those with placeholders.
INLINE = re.compile(r"`((?:fullweight|make)(?: [^`<]+)?)`")
PATHLIKE = re.compile(r"`([\w./-]+(?:\.(?:py|toml|md|cpp|svg)|/))`")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


documents = pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(path: Path) -> Iterator[list[str]]:
    """Words of every command in the document: shell blocks, and code spans in prose."""
    for block in [*blocks(path, "bash"), *blocks(path, "sh")]:
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for text in INLINE.findall(path.read_text(encoding="utf-8")):
        yield shlex.split(text)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def check_help(*names: str) -> None:
    page = CliRunner().invoke(app, [*names, "--help"])
    assert page.exit_code == 0, page.output


def check_fullweight(words: list[str]) -> dict[str, Any]:
    """Parse the arguments as the command line would, without running; returns the parameters, {} for a group."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("fullweight", words, resilient_parsing=not words)
    while words and hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        check_help(*context.command_path.split()[1:], name)
        # prose may name a command without its arguments
        context = command.make_context(name, words, parent=context, resilient_parsing=not words)
    return dict(context.params)


@documents
def test_commands_exist(path: Path) -> None:
    """Every make target, command, option and recipe that a document shows is there, and its values are valid."""
    for words in commands(path):
        if "fullweight" in words:
            parameters = check_fullweight(words[words.index("fullweight") + 1 :])
            recipe = parameters.get("recipe")
            if recipe is not None:
                values = apply_overrides(read_toml(ROOT / recipe), parameters["overrides"] or [])
                RunConfig.resolve(values, str(recipe))
        elif words[0] == "make":
            targets = {word for word in words[1:] if "=" not in word}
            assert targets <= make_targets(), words
        else:
            assert words[0] in SHELL_WORDS, f"{words[0]}: a command that this test does not know"


@documents
def test_links_resolve(path: Path) -> None:
    """Every relative link and picture is a file of the repository, and its anchor a heading of that file."""
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@documents
def test_file_names_exist(path: Path) -> None:
    """A file or folder named in prose exists, under the repository, the package, its model tests or beside."""
    homes = (ROOT, ROOT / "src" / "fullweight", ROOT / "tests" / "unit" / "models", path.parent)
    made_by_a_run = {"runs/"}
    for name in PATHLIKE.findall(path.read_text(encoding="utf-8")):
        assert name in made_by_a_run or any((home / name).exists() for home in homes), name


def test_readme_opens_with_the_two_commands_and_ci_calls_them() -> None:
    """A newcomer's first two commands are the ones that CI runs."""
    first = blocks(ROOT / "README.md", "bash")[0].splitlines()
    assert first == ["make quickstart", "make test"]
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    for command in (*first, "make lint", "make test-slow"):
        assert re.search(rf" {command}( |$)", ci.read_text(encoding="utf-8"), re.MULTILINE), command


def test_make_help_names_every_target() -> None:
    """`make help` is made from the comments, and every target has one."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    [phony] = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(phony.split()) == make_targets()
    assert set(re.findall(r"^([a-z-]+):.*## \w", text, re.MULTILINE)) == make_targets()


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipes_resolve(path: Path) -> None:
    """Every shipped recipe is a valid configuration and carries its file's name."""
    config = RunConfig.from_toml(path)
    assert config.name == path.stem


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.parent.name == "docs"], ids=by_name)
def test_python_examples_run(path: Path) -> None:
    """The examples of a guide run in order, assertions included."""
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in blocks(path, "python"):
        exec(compile(block, str(path), "exec"), namespace)
