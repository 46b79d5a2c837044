"""What part of the model a published tensor is of, by its name alone: kind, layer, expert. Imports no torch."""

from __future__ import annotations

import re

_KINDS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"^embed\.", "embedding"),
        (r"^head\.", "head"),
        (r"\.ffn\.experts\.", "routed experts"),
        (r"\.ffn\.shared_experts\.", "shared experts"),
        (r"\.ffn\.gate\.", "router"),
        (r"\.indexer\.", "indexer"),
        (r"\.compressor\.", "compressor"),
        (r"(^|\.)hc_", "hyper-connections"),
        (r"norm\.weight$", "norms"),
        (r"\.attn\.", "attention"),
        (r"^mtp\.\d+\.[eh]_proj\.", "MTP projections"),
    )
)
_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)\.")


def kind_of(name: str) -> str:
    """What part of the model a published tensor belongs to.

    >>> kind_of("layers.3.attn.indexer.wq_b.weight"), kind_of("mtp.0.e_proj.weight")
    ('indexer', 'MTP projections')
    """
    return next(kind for pattern, kind in _KINDS if pattern.search(name))


def layer_of(name: str) -> str:
    """ "embed", "layers.3", "head" (with the last norm and hyper-connection) or "mtp.0"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "embed" if parts[0] == "embed" else "head"


def expert_of(name: str) -> int | None:
    """The number of the routed expert whose matrix it is, or None."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])
