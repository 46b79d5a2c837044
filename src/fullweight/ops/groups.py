"""Operations in groups: what a recipe chooses together, and a set that is put together from several."""

from __future__ import annotations

from collections.abc import Mapping

from fullweight.ops.reference import GROUPS, ReferenceOperations

__all__ = ["GROUPS", "ComposedOperations"]


class ComposedOperations(ReferenceOperations):
    """`base`, with the groups in `others` from other sets. Inside an operation its own set goes on."""

    def __init__(self, base: ReferenceOperations, others: Mapping[str, ReferenceOperations]) -> None:
        self.parts = {group: others.get(group, base) for group in GROUPS}
        for group, part in self.parts.items():
            for method in GROUPS[group]:
                setattr(self, method, getattr(part, method))
        self.name = ", ".join([base.name, *(f"{group}={part.name}" for group, part in others.items())])

    def part(self, group: str) -> ReferenceOperations:
        return self.parts[group]
