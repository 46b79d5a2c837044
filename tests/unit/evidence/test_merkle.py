"""Roots of RFC 6962: published values, and every change of a leaf, of their order or of a proof is seen."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullweight.evidence.merkle import proof, proves, root

# Test vectors of RFC 6962's authors (certificate-transparency, merkletree): the root of the first n leaves.
LEAVES = [bytes.fromhex(t) for t in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
LEAVES.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}
lists = st.lists(st.binary(max_size=40), min_size=1, max_size=20)


def by_definition(leaves: list[bytes]) -> bytes:
    """MTH of the RFC, word by word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + by_definition(leaves[:k]) + by_definition(leaves[k:])).digest()


@pytest.mark.parametrize(("size", "expected"), ROOTS.items())
def test_published_roots(size: int, expected: str) -> None:
    assert root(LEAVES[:size]) == expected


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 8, 9, 100])
def test_a_stream_has_the_root_of_the_definition(size: int) -> None:
    leaves = [str(n).encode() for n in range(size)]
    assert root(iter(leaves)) == by_definition(leaves).hex()


@given(lists)
def test_every_leaf_has_a_proof(leaves: list[bytes]) -> None:
    """No longer than the tree is high; for this leaf, this place, this size and this root alone."""
    expected, size = root(leaves), len(leaves)
    for index, leaf in enumerate(leaves):
        path = proof(leaves, index)
        assert len(path) <= (size - 1).bit_length()
        assert proves(path, leaf, index, size, expected)
        assert not proves(path, leaf + b"x", index, size, expected)
        assert not proves(path, leaf, size, size, expected)
        assert not proves(path, leaf, index, size, root([*leaves, b""]))
        assert not proves([*path, expected], leaf, index, size, expected)
        assert not proves(["no hash"], leaf, index, size, expected)
        if path:
            assert not proves(path[:-1], leaf, index, size, expected)
            assert not proves([path[0][::-1], *path[1:]], leaf, index, size, expected) or path[0] == path[0][::-1]


@given(lists, st.data())
def test_a_changed_leaf_or_another_order_is_another_root(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    changed = [*leaves]
    changed[index] = data.draw(st.binary(max_size=40))
    assert (root(changed) == root(leaves)) == (changed == leaves)
    shuffled = data.draw(st.permutations(leaves))
    assert (root(shuffled) == root(leaves)) == (shuffled == leaves)
    assert root([*leaves, b""]) != root(leaves) != root(leaves[:-1])
