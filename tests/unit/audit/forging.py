"""A bundle in the hands of a forger: what can be changed, and how well the traces can be covered.

Covering goes in steps: the list of files (`relist`), the ledger's chain and all that follows from it (`rechain`),
and every figure and claim, by the program's own code (`restate`). What is left to give a forger away then is what
the forger cannot make: a signature, checkpoints that name the ledger, the data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fullweight.audit.claims import CLAIMS
from fullweight.audit.file_rules import evaluations
from fullweight.audit.rule import Status
from fullweight.audit.subject import open_subject
from fullweight.audit.verify import Report
from fullweight.evidence.performance import performance

Entry = dict[str, Any]


class Forgery:
    """A copy of a bundle, or of a bundle and its run, that may be changed."""

    def __init__(self, bundle: Path, folder: Path, run: Path | None = None) -> None:
        self.root, self.run = folder / "bundle", None if run is None else folder / "run"
        shutil.copytree(bundle, self.root)
        if run is not None and self.run is not None:
            shutil.copytree(run, self.run)

    def lines(self) -> list[Entry]:
        return [json.loads(line) for line in (self.root / "ledger.jsonl").read_text().splitlines()]

    def write_lines(self, lines: list[Entry], chained: bool = True) -> None:
        """The ledger anew, with a chain that fits unless `chained` is false."""
        texts, before = [], "0" * 64
        for entry in lines:
            if chained:
                entry["previous"] = before
            text = json.dumps(entry, separators=(",", ":"))
            before = hashlib.sha256(text.encode()).hexdigest()
            texts.append(text + "\n")
        (self.root / "ledger.jsonl").write_text("".join(texts))

    def edit_lines(self, change: Callable[[list[Entry]], None], chained: bool = True) -> None:
        """Change the ledger's lines in place, and cover it as far as the program's own code can."""
        lines = self.lines()
        change(lines)
        self.write_lines(lines, chained)
        self.restate()

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file; `change` works in place or returns another value."""
        value = json.loads((self.root / name).read_text())
        changed = change(value)
        (self.root / name).write_text(json.dumps(value if changed is None else changed))

    def edit_manifest(self, change: Callable[[Any], Any]) -> None:
        """Change the manifest, and bind the first line to what it is now."""
        self.edit("manifest.json", change)
        digest = hashlib.sha256((self.root / "manifest.json").read_bytes()).hexdigest()
        self.edit_lines(lambda lines: lines[0].update(manifest_sha256=digest))

    def relist(self) -> None:
        """Make the list of files fit what is there, and the end of the ledger."""
        content = (self.root / "ledger.jsonl").read_bytes()
        listing = json.loads((self.root / "bundle.json").read_text())
        last = content.splitlines()[-1]
        head = hashlib.sha256(last).hexdigest()
        listing["ledger"] = {"lines": content.count(b"\n"), "size_bytes": len(content), "head": head}
        files = sorted(
            p for p in self.root.rglob("*") if p.is_file() and p.name not in ("bundle.json", "bundle.sig")
        )
        listing["files"] = [
            {
                "path": p.relative_to(self.root).as_posix(),
                "size_bytes": p.stat().st_size,
                "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            }
            for p in files
        ]
        (self.root / "bundle.json").write_text(json.dumps(listing))

    def restate(self) -> None:
        """Figures, evaluations and claims as they follow from the ledger now."""
        self.relist()
        subject = open_subject(self.root)
        figures = performance(subject.history, subject.flops)
        values = {kind.name: kind.value(subject, figures) for kind in CLAIMS}
        self.edit("performance.json", lambda _: figures)
        self.edit("evaluation.json", lambda _: evaluations(subject.history))
        self.edit("claims.json", lambda claims: [c.update(value=values[c["name"]]) for c in claims] and claims)
        self.relist()


def refuted(report: Report) -> dict[str, str]:
    """What does not hold, by name: rules, and claims as `claim:name`."""
    found = {f.rule: f.told for f in report.findings if f.status is Status.refuted}
    return found | {f"claim:{v.claim}": v.told for v in report.verdicts if v.status is Status.refuted}


def steps(lines: list[Entry]) -> list[Entry]:
    return [line for line in lines if line["kind"] == "step"]


def named(lines: list[Entry], what: str) -> list[Entry]:
    return [line for line in lines if line.get("what") == what]


def retime(step: Entry, seconds: dict[str, float]) -> None:
    """Give a step other times, with every rate that follows from them."""
    flops = step["model_flops_per_second"] * step["seconds"]["total"]
    step["seconds"] = seconds
    step["tokens_per_second"] = step["tokens"]["real"] / seconds["total"]
    step["model_flops_per_second"] = flops / seconds["total"]
    step["mfu"] = step["model_flops_per_second"] / step["peak"]["flops_per_second"]
