"""Strict configuration: every user's mistake is one ConfigError that says what, where and what to do."""

import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, ValidationError

from fullweight.core.config import Config, apply_overrides, nearest, read_toml
from fullweight.core.errors import ConfigError, FullweightError


class Inner(Config):
    learning_rate: float = 1e-3
    num_steps: PositiveInt = 10


class Outer(Config):
    name: str
    train: Inner = Inner()
    stages: tuple[Inner, ...] = ()
    optional: Inner | None = None


def test_unknown_keys_name_the_nearest_valid_one() -> None:
    """At any depth, in a list and through an optional, the key's full path and a suggestion are given."""
    cases = [
        ({"name": "x", "trian": {}}, "unknown key trian; did you mean 'train'?"),
        ({"name": "x", "train": {"num_step": 1}}, "unknown key train.num_step; did you mean 'num_steps'?"),
        ({"name": "x", "stages": [{}, {"lerning_rate": 1}]}, "stages.1.lerning_rate; did you mean 'learn"),
        ({"name": "x", "optional": {"zzz": 1}}, "optional.zzz; valid: learning_rate, num_steps"),
    ]
    for values, message in cases:
        with pytest.raises(ConfigError) as caught:
            Outer.resolve(values, "recipe.toml")
        assert str(caught.value).startswith("recipe.toml: ")
        assert message in str(caught.value)


def test_every_mistake_is_listed_with_what_was_found() -> None:
    """One message for all mistakes: missing, wrong type, out of range, not finite."""
    values = {"train": {"num_steps": 0, "learning_rate": float("nan")}, "stages": 3}
    with pytest.raises(ConfigError) as caught:
        Outer.resolve(values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "name is required and has no default" in lines[0]
    assert any("train.num_steps" in line and "(found 0)" in line for line in lines)
    assert any("train.learning_rate" in line and "finite" in line for line in lines)
    assert any("stages" in line and "(found 3)" in line for line in lines)
    assert issubclass(ConfigError, FullweightError)
    assert issubclass(FullweightError, ValueError)


def test_a_config_cannot_be_changed() -> None:
    """Frozen: what was written beside the run stays what ran."""
    config = Outer(name="x")
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "y"  # type: ignore[misc]


def test_json_spells_out_every_default_and_resolves_to_the_same() -> None:
    """The JSON beside a run is complete and loads back equal."""
    config = Outer.resolve({"name": "é", "stages": [{"num_steps": 3}]})
    values = json.loads(config.to_json())
    assert values["train"] == {"learning_rate": 1e-3, "num_steps": 10}
    assert Outer.resolve(values) == config


def test_toml_with_overrides(tmp_path: Path) -> None:
    """Overrides are applied in order on top of the file; sections are created on the way."""
    path = tmp_path / "recipe.toml"
    path.write_text('name = "a"\n[train]\nnum_steps = 5\n', encoding="utf-8")
    config = Outer.from_toml(
        path, ["train.num_steps=6", "train.num_steps=7", "name=b c", "optional.num_steps = 2"]
    )
    assert (config.name, config.train.num_steps) == ("b c", 7)
    assert config.optional == Inner(num_steps=2)
    with pytest.raises(ConfigError, match=r"recipe\.toml: unknown key train\.steps"):
        Outer.from_toml(path, ["train.steps=1"])


def test_override_values() -> None:
    """A TOML value when it parses as one, a bare string otherwise; the input is not modified."""
    values = {"a": {"b": [1]}}
    texts = {
        "1": 1,
        "1.5": 1.5,
        "true": True,
        "[1, 2]": [1, 2],
        '"1"': "1",
        "some/path=x": "some/path=x",
        "": "",
        "1\nother = 2": "1\nother = 2",
        "1 # note": 1,
        "{x = 1}": {"x": 1},
    }
    for text, value in texts.items():
        assert apply_overrides(values, [f"a.c={text}"]) == {"a": {"b": [1], "c": value}}
    assert values == {"a": {"b": [1]}}
    assert apply_overrides({"day": datetime.date(2026, 1, 2)}, []) == {"day": "2026-01-02"}


@pytest.mark.parametrize("override", ["a", "=1", ".a=1", "a.=1", "a..b=1", ""])
def test_malformed_overrides_are_refused(override: str) -> None:
    """An override without a key or an equals sign shows itself and the right form."""
    with pytest.raises(ConfigError, match="--set takes key=value, such as"):
        apply_overrides({}, [override])


def test_an_override_below_a_value_is_refused() -> None:
    """`a.b.c=1` where a.b is a number."""
    with pytest.raises(ConfigError, match=r"--set a\.b\.c=1: 'b' is a value, not a section"):
        apply_overrides({"a": {"b": 3}}, ["a.b.c=1"])


@given(st.text(alphabet="abc.=[]{}\"'\n\\# 1", max_size=12))
def test_any_override_text_is_applied_or_refused(text: str) -> None:
    """No text makes anything but a changed dict or a ConfigError."""
    try:
        result = apply_overrides({"a": {"b": 1}}, [text])
    except ConfigError:
        return
    assert isinstance(result, dict)


def test_unreadable_files(tmp_path: Path) -> None:
    """Absent, a folder, below a file, binary and malformed: one message each, naming the path."""
    binary, broken = tmp_path / "binary.toml", tmp_path / "broken.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    broken.write_text("a = 1\nb = [1,\nc = 2\n")
    cases = [
        (tmp_path / "none.toml", "no recipe at .*none.toml; give the path"),
        (tmp_path, "cannot be read: Is a directory"),
        (broken / "x.toml", "cannot be read: Not a directory"),
        (binary, "is not a TOML file"),
        (broken, r"broken.toml is not a TOML file: .*line 3"),
    ]
    for path, message in cases:
        with pytest.raises(ConfigError, match=message):
            read_toml(path)


def test_what_no_stack_holds_is_refused(tmp_path: Path) -> None:
    """Nesting beyond the interpreter's stack and endless numbers are mistakes too, in a file and in --set."""
    path = tmp_path / "a.toml"
    for text in ("a = " + "[" * 5000, ".".join(["a"] * 2000) + " = 1", "a = " + "9" * 5000):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"nested too deeply|too many digits"):
            apply_overrides(read_toml(path), [])
    assert apply_overrides({}, ["a=" + "[" * 5000]) == {"a": "[" * 5000}


def test_a_wrong_item_is_told_once_and_long_lists_are_cut() -> None:
    """Not also as a list that is too short; and a file of something else does not fill the screen."""

    class Item(Config):
        size: int

    class Holder(Config):
        items: tuple[Item, ...] = Field(min_length=1)

    with pytest.raises(ConfigError) as caught:
        Holder.resolve({"items": [{"size": "x" * 1000}]})
    assert "too short" not in str(caught.value)
    assert "at least 1" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(ConfigError, match="at least 1 item"):
        Holder.resolve({"items": []})
    with pytest.raises(ConfigError, match="and 29 more"):
        Holder.resolve({f"k{i}": 1 for i in range(40)})


def test_nearest_lists_all_names_when_none_is_close() -> None:
    assert nearest("adamW", ["adamw", "muon"]) == "did you mean 'adamw'?"
    assert nearest("xyz", ["muon", "adamw"]) == "valid: adamw, muon"
