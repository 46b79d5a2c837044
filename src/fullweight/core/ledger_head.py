"""How far a ledger had come, as a checkpoint remembers it: in `core`, since the ledger's own home lies above."""

from __future__ import annotations

from fullweight.core.config import Config


class LedgerHead(Config):
    """The ledger up to a point: how long it was, and the SHA-256 of those bytes."""

    size_bytes: int
    num_lines: int
    sha256: str
