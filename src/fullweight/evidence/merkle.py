"""A hash tree over a list: one root stands for all leaves and their order, and a short proof shows one leaf.

The hashing is that of Certificate Transparency (RFC 6962, section 2.1), so that any implementation of it agrees:
a leaf is SHA-256(0x00 | leaf), a node SHA-256(0x01 | left | right), the left part of n leaves holds the largest
power of two below n, and no leaves at all are SHA-256 of nothing. Prefixes keep a node from passing for a leaf.

Left out: keeping the tree. Roots are computed from a stream, proofs from all leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def root(leaves: Iterable[bytes]) -> str:
    """Root of the tree, in hex. Keeps one hash a level, so leaves may be a stream of any length.

    >>> root([]) == hashlib.sha256().hexdigest()
    True
    """
    pending: list[tuple[int, bytes]] = []  # (leaves under it, hash) from left to right
    for leaf in leaves:
        size, value = 1, _leaf(leaf)
        while pending and pending[-1][0] == size:
            size, value = 2 * size, _node(pending.pop()[1], value)
        pending.append((size, value))
    return (_join([value for _, value in pending]) if pending else hashlib.sha256().digest()).hex()


def proof(leaves: Sequence[bytes], index: int) -> list[str]:
    """Hashes, in hex, that lead from leaf `index` to the root, from the bottom up."""
    assert 0 <= index < len(leaves), f"leaf {index} of {len(leaves)}"
    if len(leaves) == 1:
        return []
    split = _split(len(leaves))
    if index < split:
        return [*proof(leaves[:split], index), root(leaves[split:])]
    return [*proof(leaves[split:], index - split), root(leaves[:split])]


def proves(path: Sequence[str], leaf: bytes, index: int, size: int, expected: str) -> bool:
    """Whether `path` shows that `leaf` is number `index` of the `size` leaves under the root `expected`.

    A path that is no list of hashes shows nothing.
    """
    try:
        hashes = [bytes.fromhex(part) for part in path]
    except ValueError:
        return False
    if not 0 <= index < size:
        return False
    found = _climb(_leaf(leaf), index, size, hashes)
    return found is not None and found.hex() == expected


def _climb(value: bytes, index: int, size: int, hashes: list[bytes]) -> bytes | None:
    """The root above `value`; None when there are too many or too few hashes."""
    if size == 1:
        return value if not hashes else None
    if not hashes:
        return None
    *below, beside = hashes
    split = _split(size)
    if index < split:
        left = _climb(value, index, split, below)
        return None if left is None else _node(left, beside)
    right = _climb(value, index - split, size - split, below)
    return None if right is None else _node(beside, right)


def _join(values: list[bytes]) -> bytes:
    *left, value = values
    for other in reversed(left):
        value = _node(other, value)
    return value


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()
