"""The receipt of a conversion: what was read, what was written, and that nothing is missing or left over.

A JSON file beside the weights. Every tensor is listed with name, file, dtype, shape, bytes and SHA-256 of its
data, where it went or came from, and what rounding cost. Two receipts of the same checkpoint can be compared
without the checkpoints, and `fullweight convert inspect --receipt` compares one with a folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullweight.checkpoint.blocks import Encoded
from fullweight.checkpoint.catalogue import few
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.native import decoder_name
from fullweight.core import durable
from fullweight.core.errors import CheckpointError
from fullweight.core.strict_json import parse_json

RECEIPT = "receipt.json"
_VERSION = 1
_GIVE = f"give the {RECEIPT} that a conversion left"


@dataclass
class Rounding:
    """What writing a tensor lost, and under which scales its blocks were written.

    `reused_blocks` are exact under the source's scale; `rule_blocks` took the release's rule, because there is
    no source or its scale does not represent the trained values. `relative_error` is root mean square of the
    error over that of the values.
    """

    max_error: float = 0.0
    relative_error: float = 0.0
    reused_blocks: int = 0
    rule_blocks: int = 0
    _squared_error: float = field(default=0.0, repr=False)
    _squared_norm: float = field(default=0.0, repr=False)

    def add(self, max_error: float, squared_error: float, squared_norm: float) -> None:
        self.max_error = max(self.max_error, max_error)
        self._squared_error += squared_error
        self._squared_norm += squared_norm
        self.relative_error = math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def add_blocks(self, encoded: Encoded) -> None:
        self.reused_blocks += encoded.reused_blocks
        self.rule_blocks += encoded.rule_blocks
        self.add(encoded.max_error, encoded.squared_error, encoded.squared_norm)

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if not k.startswith("_")}


@dataclass
class Receipt:
    """One conversion. Entries of `read` have `destination`, those of `written` have `origin` and rounding."""

    operation: str
    format: str
    names: str
    origin: str
    read: list[dict[str, Any]] = field(default_factory=list)
    written: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)  # {"name", "why"}: known and not converted
    scales_from: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The file's content; opening the source proved that nothing is missing or left over."""
        keys = ("reused_blocks", "rule_blocks")
        return {
            "receipt": _VERSION,
            "operation": self.operation,
            "origin": self.origin,
            "format": self.format,
            "names": self.names,
            "scales_from": self.scales_from,
            "decoder": decoder_name(),
            "missing": [],
            "left_over": [],
            "left_out": self.left_out,
            "totals": {
                "read": _totals(self.read),
                "written": _totals(self.written),
                **{key: sum(entry.get(key, 0) for entry in self.written) for key in keys},
                "inexact_tensors": sum(entry["max_error"] > 0 for entry in self.written),
            },
            "read": self.read,
            "written": self.written,
        }

    def write(self, path: Path) -> None:
        durable.write(path, (json.dumps(self.as_json(), indent=1) + "\n").encode())


def _totals(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {"tensors": len(entries), "bytes": sum(entry["bytes"] for entry in entries)}


def described(folder: PublishedFolder, name: str) -> dict[str, Any]:
    """Name, file, dtype, shape, bytes and, once it was read whole, hash of a stored tensor."""
    entry = folder.catalogue.entries[name]
    return {
        "name": name,
        "file": folder.files[name],
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "bytes": entry.num_bytes,
        "sha256": folder.whole_hash(name),
    }


def compare(folder: PublishedFolder, receipt: Path) -> int:
    """Hash every tensor of `folder` and compare with what the receipt says was written; returns how many.

    Raises CheckpointError naming the tensors that differ, are missing or are not in the receipt.
    """
    try:
        found = parse_json(receipt.read_bytes())
        listed = {str(entry["name"]): dict(entry) for entry in found["written"]}
        version = found["receipt"]
    except OSError as error:
        raise CheckpointError(f"{receipt} cannot be read: {error.strerror}; {_GIVE}") from None
    except (KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else "is not a list of tensors"
        raise CheckpointError(f"{receipt} is no receipt: it {what}; {_GIVE}") from None
    except ValueError as error:
        raise CheckpointError(f"{receipt} is no receipt: {error}; {_GIVE}") from None
    if version != _VERSION:
        raise CheckpointError(f"{receipt} is a receipt of version {version!r}; this program reads {_VERSION}")
    absent, unknown = sorted(listed.keys() - folder.files.keys()), sorted(folder.files.keys() - listed.keys())
    if absent or unknown:
        raise CheckpointError(f"{folder.path} lacks {few(absent)} of {receipt}, which lacks {few(unknown)}")
    wrong = []
    for name, entry in listed.items():
        folder.hash_whole(name)
        now = described(folder, name)
        if any(now[key] != entry.get(key) for key in ("dtype", "shape", "sha256")):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"{folder.path} differs from {receipt} in {few(wrong)}")
    return len(listed)
