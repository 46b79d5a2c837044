"""Where the weights of two runs part: the first common checkpoint that differs, and the first tensor in it.

Tensors come in the order of the forward pass, since a difference early in it spreads to everything behind, and the
first one is where to look. Only the model is compared: moments differ wherever the weights do. Checkpoints of two
numbers of ranks compare like any others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fullweight.checkpoint import generations
from fullweight.checkpoint.compare import TensorDifference, compare
from fullweight.checkpoint.manifest import Facts, verify
from fullweight.evidence.bundle import LIST
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4

_MODEL = "model."
_LATE = {"norm": 2, "hc_head_fn": 2, "hc_head_base": 2, "hc_head_scale": 2, "head": 3, "mtp": 4}


@dataclass(frozen=True)
class Parting:
    """What the checkpoints that two runs have in common say."""

    equal_steps: list[int]  # at which every weight has the same bits
    step: int | None = None  # the first common step at which some differ
    tensors: tuple[TensorDifference, ...] = ()  # those that differ there, in the order of the forward pass

    def __str__(self) -> str:
        if not self.equal_steps and self.step is None:
            return "weights not comparable: the runs keep no checkpoint of the same step"
        equal = f"weights equal bit for bit at step {', '.join(map(str, self.equal_steps))}"
        if self.step is None:
            return equal
        first = self.tensors[0]
        how = first.note or f"relative difference {first.relative:.3g}"
        found = f"at step {self.step}: {len(self.tensors)} tensors differ, the first of them {first.name} ({how})"
        return f"{equal}; {found}" if self.equal_steps else f"weights {found}"


def weights_in(folder: Path) -> bool:
    """Whether a run's folder of checkpoints is there; a bundle's can hold their manifests alone."""
    if not (folder.parent / LIST).is_file():
        return folder.is_dir()
    return any(folder.glob("*/.metadata"))


def parting(a: Path, b: Path) -> Parting:
    """Compare the checkpoints in two folders of them, step by step. Raises CorruptError on a damaged one."""
    left, right = (dict(generations.listed(folder)) for folder in (a, b))
    equal: list[int] = []
    for step in sorted(left.keys() & right.keys()):
        one, other = verify(left[step]), verify(right[step])
        differing = compare(one, other, prefix=_MODEL).tensors
        if differing:
            place = forward_order(one.manifest.facts)
            found = sorted(differing, key=lambda d: place.get(d.name, len(place)))
            return Parting(equal, step, tuple(found))
        equal.append(step)
    return Parting(equal)


def forward_order(facts: Facts) -> dict[str, int]:
    """The place of each tensor of the model in its forward pass, by the name under which it is saved."""
    with torch.device("meta"):
        model = DeepSeekV4(DeepSeekV4Config.from_published(facts.model, "the checkpoint"))
    names = list(model.state_dict())
    names.sort(key=lambda name: 0 if name.startswith("embed") else _LATE.get(name.split(".")[0], 1))
    return {f"{_MODEL}{name}": place for place, name in enumerate(names)}
