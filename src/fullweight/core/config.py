"""Frozen, strict configuration: TOML in, one nested pydantic model out.

Every component owns a `Config` subclass and a parent nests its children, repeating no field. Unknown keys
are refused with the nearest valid name; the resolved config is written as JSON beside the run. This module
imports no torch.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from fullweight.core.errors import ConfigError

_SHOWN_CHARACTERS, _SHOWN_LINES = 200, 12


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, validated defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def resolve(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Validate a nested dict; raises ConfigError naming each key, what was found and what is valid."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, source)) from None

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file and apply `a.b=c` overrides in order."""
        return cls.resolve(apply_overrides(read_toml(path), overrides), str(path))

    def to_json(self) -> str:
        """The resolved config, every default spelt out."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def read_toml(path: str | Path, what: str = "recipe") -> dict[str, Any]:
    """Parse a TOML file; raises ConfigError when it is absent (no `what` there) or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no {what} at {path}; give the path of a .toml file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give the path of a .toml file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    except ValueError:  # what is left is int(), which refuses more than 4300 digits
        raise ConfigError(f"{path} cannot be read: a number has too many digits") from None
    except RecursionError:
        raise ConfigError(f"{path} cannot be read: its values are nested too deeply") from None


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` set; c is a TOML value, or else a bare string.

    >>> apply_overrides({"a": {"b": 1}}, ["a.b=2", "a.c=[1, 2]", "d=text"])
    {'a': {'b': 2, 'c': [1, 2]}, 'd': 'text'}
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    except RecursionError:
        raise ConfigError("the recipe's sections are nested too deeply") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set takes key=value, such as train.num_steps=100; found {override!r}")
        table = result
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: {part!r} is a value, not a section")
        table[parts[-1]] = _toml_value(text)
    return result


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # no TOML, or a value that nothing could hold
        return text
    return parsed["value"] if len(parsed) == 1 else text  # several lines are a string, not more keys


def nearest(name: str, valid: Sequence[str], most: int = 1) -> str:
    """'did you mean ...?' for the closest valid names, `most` of them, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=most, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(sorted(valid))}"


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names valid at a location inside a nested model (union members are merged)."""
    models: list[type[BaseModel]] = [model]
    for part in location:
        found: list[type[BaseModel]] = []
        for current in models:
            if part in current.model_fields:
                found += _models_in(current.model_fields[str(part)].annotation)
        models = found or models
    return sorted({name for current in models for name in current.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]


def _explain(model: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    errors = error.errors(include_url=False)
    for item in errors:
        location, kind = item["loc"], item["type"]
        inside = any(len(e["loc"]) > len(location) and e["loc"][: len(location)] == location for e in errors)
        if kind == "too_short" and inside:
            continue  # a tuple is only short because of an item that is told on its own
        where = ".".join(str(p) for p in location)
        if kind == "extra_forbidden":
            hint = nearest(str(location[-1]), _fields_at(model, location[:-1]))
            lines.append(f"unknown key {where}; {hint}")
        elif kind == "missing":
            lines.append(f"{where} is required and has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = "" if isinstance(item["input"], dict) else f" (found {_short(item['input'])})"
            lines.append(f"{where}: {message}{found}" if where else f"{message}{found}")
    if len(lines) > _SHOWN_LINES:
        lines[_SHOWN_LINES:] = [f"and {len(lines) - _SHOWN_LINES} more"]
    return f"{source}: " + "\n  ".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
