"""What messages tell users to set exists: every recipe key and command-line option that a text names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from fullweight.cli.main import app
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.train.config import RunConfig

SOURCE = Path(__file__).parents[2] / "src" / "fullweight"
# models/ and ops/ know no recipe; their texts are full of tensor names such as model.layers.
FILES = [p for p in sorted(SOURCE.rglob("*.py")) if not {"models", "ops"} & set(p.relative_to(SOURCE).parts)]
SECTIONS = "|".join(RunConfig.model_fields)
KEY = re.compile(rf"(?<![\w./])(?:{SECTIONS})(?:\.[a-z_]+)+(?![\w/(])")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SUFFIXES = (".json", ".toml", ".py")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that holds a space, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in alone:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if " " in text:  # others are names and arguments
            yield node.lineno, text


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def is_key(name: str) -> bool:
    """Whether a recipe may set this dotted name."""
    *path, last = name.split(".")
    models: list[type[BaseModel]] = [RunConfig]
    for part in path:
        if (part, models[0].__name__) == ("changes", "ModelSection"):
            models = [DeepSeekV4Config]
            continue
        models = [
            m
            for model in models
            if part in model.model_fields
            for m in models_in(model.model_fields[part].annotation)
        ]
    return any(last in model.model_fields for model in models)


def options() -> set[str]:
    """Every option of every command."""
    found, commands = set(), [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return found | {"--help"}


def test_the_checks_can_fail() -> None:
    """Names that once stood in messages and never existed, beside ones that do."""
    assert not is_key("optimizer.lr")
    assert not is_key("optimizer.max_grad_norm")
    assert not is_key("train.num_steps.more")
    assert is_key("optimizer.muon.ns_dtype")
    assert is_key("model.changes.vocab_size")
    assert is_key("data.sources.columns.prompt")
    assert "--no-such" not in options()
    assert {"--set", "--columns"} <= options()
    assert sum(len(KEY.findall(text)) for path in FILES for _, text in texts(path)) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_names_in_texts_exist(path: Path) -> None:
    """A fix that names a key or an option names one that there is."""
    for line, text in texts(path):
        wrong = [key for key in KEY.findall(text) if not key.endswith(SUFFIXES) and not is_key(key)]
        wrong += [option for option in OPTION.findall(text) if option not in options()]
        assert not wrong, f"{path}:{line}: {wrong} in {text!r}"
