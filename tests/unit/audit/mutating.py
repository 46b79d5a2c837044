"""Random damage to a bundle: bytes, files, and values of another type in its JSON, covered up or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from tests.unit.audit.forging import Forgery

_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**18,
    10**400,
    1e308,
    "",
    "x",
    "nan",
    [],
    {},
    [[]],
    {"x": None},
    [1],
)


def damage(root: Path, random: Random) -> str:
    """Change bytes or files of a bundle in place; what was done, empty where nothing changed."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    path = random.choice(files)
    content, name = path.read_bytes(), path.relative_to(root).as_posix()
    kind = random.choice(("cut", "delete", "swap", "flip", "insert", "repeat", "empty"))
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = random.choice([p for p in files if p != path])
        if content == other.read_bytes():
            return ""
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        name += f" and {other.relative_to(root).as_posix()}"
    else:
        place = random.randrange(len(content))
        changed = {
            "cut": content[:place],
            "flip": content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :],
            "insert": content[:place] + random.randbytes(random.randrange(1, 9)) + content[place:],
            "repeat": content + content[place:],
            "empty": b"",
        }[kind]
        path.write_bytes(changed)
        if changed == content:
            return ""
    return f"{kind} {name}"


def retype(forgery: Forgery, random: Random) -> str:
    """Put a value of another kind in the place of one, or take a key away; list and chain are made to fit."""
    files = sorted(p for p in forgery.root.rglob("*.json*") if p.name not in ("bundle.sig",))
    path = random.choice(files)
    name = path.relative_to(forgery.root).as_posix()
    if path.suffix == ".jsonl":
        lines = forgery.lines()
        number = random.randrange(len(lines))
        told = _change(lines[number], random)
        forgery.write_lines(lines, chained=bool(random.randrange(4)))
        forgery.relist()
        return f"{name}:{number + 1} {told}"
    value = json.loads(path.read_text())
    if name != "bundle.json" and not random.randrange(8):
        value, told = random.choice(_VALUES), "all of it"
    else:
        told = _change(value, random)
    path.write_text(json.dumps(value))
    if name != "bundle.json":
        forgery.relist()
    return f"{name} {told}"


def _change(value: Any, random: Random) -> str:
    """Change a leaf or branch of nested lists and dicts in place; where."""
    way: list[str] = []
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = random.choice(keys)
        way.append(str(key))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and random.randrange(4):
            value = inner
            continue
        if random.randrange(5):
            value[key] = random.choice(_VALUES)
            return f"{'.'.join(way)} = {str(value[key])[:20]!r}"
        del value[key]
        return f"{'.'.join(way)} removed"


def fresh(bundle: Path, folder: Path) -> Forgery:
    """The bundle anew, in place of what was made of it before."""
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    return Forgery(bundle, folder)
