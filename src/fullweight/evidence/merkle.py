"""Merkle tree hashing of RFC 6962, section 2.1, with SHA-256.

A leaf is hashed behind a zero byte, a node behind a one byte, so that no leaf can pass for a node. A tree of n
leaves splits at the largest power of two below n; of no leaves it is the hash of nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def root(leaves: Iterable[bytes]) -> str:
    """Hex root over the leaves in order; they are taken one at a time and not kept."""
    complete: list[tuple[int, bytes]] = []  # (leaves below, hash) of complete subtrees, largest first
    for leaf in leaves:
        complete.append((1, hashlib.sha256(b"\0" + leaf).digest()))
        while len(complete) > 1 and complete[-1][0] == complete[-2][0]:
            _join_last(complete)
    while len(complete) > 1:
        _join_last(complete)
    return complete[0][1].hex() if complete else hashlib.sha256(b"").hexdigest()


def _join_last(complete: list[tuple[int, bytes]]) -> None:
    (left_size, left), (right_size, right) = complete[-2:]
    complete[-2:] = [(left_size + right_size, hashlib.sha256(b"\1" + left + right).digest())]
