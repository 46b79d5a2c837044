"""The real names of environment variables that accelerators read, and what a value may be.

`environment.toml` is the table: name, meaning, default, legal values, source. A variable whose name is close to a
real one, and is none, is taken for a misspelling: libraries ignore unknown names, so that the setting would not be
made, silently. What values mean together is `rules.py`. Left out: names that only a tool's own tests read.
Imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

ANY = "any"
# A name that begins like this is meant for the vendor's software, known or not.
PREFIXES = {
    "ascend": ("HCCL_", "TORCH_HCCL_", "TORCH_NPU_", "PYTORCH_NPU_", "NPU_", "ASCEND_", "ACL_", "P2P_HCCL_"),
    "cuda": ("NCCL_", "TORCH_NCCL_", "PYTORCH_CUDA_", "CUBLAS_"),
    ANY: ("GLOO_", "TORCH_GLOO_", "TORCH_FR_"),
}
_RECORDED = (
    *("TORCH", "PYTORCH", "PYTHON", "CUDA_", "ATB_", "LCCL_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "LD_", "MALLOC_", "GLIBC_TUNABLES"),
)
# What changes results on any device, in the table or not; of names outside of it these ends tell of one machine.
_SHARED = (*("TORCH_", "PYTORCH_", "CUDNN_", "LCCL_", "ATB_"), *("OMP_", "GOMP_", "KMP_", "MKL_"))
_OF_ONE_MACHINE = ("_IFNAME", "_IF_IP", "_PORT", "_HOSTID", "_FILE", "_DIR", "_PATH", "_HOME", "_RANK", "_PSK")
_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_NEAR, _NEAR_WITH_PREFIX, _LONG = 1, 2, 12


@dataclass(frozen=True)
class Variable:
    """One real variable; of the four kinds of legal values exactly one is given."""

    name: str
    device: str  # that reads it: ascend, cuda, any
    meaning: str
    default: str  # "" = unset
    source: str
    values: tuple[str, ...] = ()
    range: tuple[int, ...] = ()
    number: tuple[float, ...] = ()
    pattern: str = ""
    per_rank: bool = False  # ranks or machines may differ
    at_start: bool = False  # read when the library is loaded
    replaced_by: str = ""
    checked: bool = True  # whether the legal values were compared with the source
    secret: bool = False  # never recorded or told

    def legal(self, value: str) -> bool:
        """Whether the library documents this value."""
        if self.values:
            return value.casefold() in {v.casefold() for v in self.values}
        if self.range:
            return bool(re.fullmatch(r"-?\d{1,19}", value)) and _within(int(value), self.range)
        if self.number:
            return bool(re.fullmatch(r"-?\d{1,19}(\.\d+)?", value)) and _within(float(value), self.number)
        return re.fullmatch(self.pattern, value) is not None

    @property
    def expected(self) -> str:
        """Legal values in words."""
        if self.values:
            return " or ".join(self.values)
        if bounds := self.range or self.number:
            kind = "an integer" if self.range else "a number"
            low = f"{bounds[0]:.0f}"
            return f"{kind} from {low} to {bounds[1]:.0f}" if len(bounds) > 1 else f"{kind} of at least {low}"
        return f"a value like {self.default or self.pattern}"


@cache
def variables() -> Mapping[str, Variable]:
    """All known variables by name."""
    text = resources.files(__package__).joinpath("environment.toml").read_text(encoding="utf-8")
    found: dict[str, Variable] = {}
    for group in tomllib.loads(text).values():
        for name, entry in group["variables"].items():
            assert name not in found, f"{name} is listed twice"
            found[name] = _variable(name, group, entry)
    return found


def _variable(name: str, group: Mapping[str, Any], entry: Mapping[str, Any]) -> Variable:
    values = {"source": group["source"], "checked": group.get("checked", True), **entry}
    lists: dict[str, Any] = {k: tuple(values.pop(k)) for k in ("values", "range", "number") if k in values}
    at_start = values.pop("read", "use") == "start"
    return Variable(name=name, device=group["device"], at_start=at_start, **lists, **values)


def relevant(device: str) -> dict[str, Variable]:
    """What software for `device` (ascend, cuda or cpu) reads."""
    return {name: v for name, v in variables().items() if v.device in (device, ANY)}


def meant_for(name: str, device: str) -> bool:
    """Whether a variable's name says that it is for the device's software."""
    return name.startswith(PREFIXES.get(device, ()) + PREFIXES[ANY])


def misspelt(name: str, device: str) -> str | None:
    """The real name that `name` must mean; None when it is real, or near none.

    One edit (or a swap of neighbours) away from any name of the device's software, underscores not counted; two,
    or the same words in another order, when it is long and begins as such names do.

    >>> misspelt("HCCL_OP_EXTENSION_MODE", "ascend")
    'HCCL_OP_EXPANSION_MODE'
    """
    if name in variables():
        return None
    prefixed = meant_for(name, device)
    limit = _NEAR_WITH_PREFIX if prefixed and len(name) >= _LONG else _NEAR
    best: tuple[int, str] | None = None
    for real in relevant(device):
        if prefixed and sorted(real.split("_")) == sorted(name.split("_")):
            return real
        if _letters_apart(real.replace("_", ""), name.replace("_", "")) > 2 * limit:
            continue
        distance = min(edits(real, name), edits(real.replace("_", ""), name.replace("_", "")))
        if distance <= limit and (best is None or (distance, real) < best):
            best = (distance, real)
    return best[1] if best else None


def value_of(name: str, environment: Mapping[str, str]) -> str:
    """The variable's value, or its default when unset or empty."""
    return environment.get(name) or variables()[name].default


def recorded(environment: Mapping[str, str]) -> dict[str, str]:
    """What a run keeps of its environment: every variable that torch, an accelerator or the launcher may read.

    Others are left out: they do not change what is computed, and may hold secrets.
    """
    prefixes = tuple({p for group in PREFIXES.values() for p in group}) + _RECORDED
    names, secret = set(variables()) | set(_LAUNCHER), {n for n, v in variables().items() if v.secret}
    kept = {n: v for n, v in sorted(environment.items()) if n in names or n.startswith(prefixes)}
    return {n: v for n, v in kept.items() if n not in secret}


def shared(environment: Mapping[str, str], device: str) -> dict[str, str]:
    """Variables that are set, matter to results or communication on the device, and must be equal on all ranks."""
    return {name: value for name, value in sorted(environment.items()) if _must_agree(name, device)}


def _must_agree(name: str, device: str) -> bool:
    known = variables().get(name)
    if known is not None:
        return known.device in (device, ANY) and not known.per_rank and not known.secret
    return (meant_for(name, device) or name.startswith(_SHARED)) and not name.endswith(_OF_ONE_MACHINE)


def edits(a: str, b: str) -> int:
    """Fewest insertions, deletions, substitutions and swaps of neighbours that turn a into b.

    >>> edits("TIMEOUT", "TIEMOUT"), edits("EXPANSION", "EXTENSION")
    (1, 2)
    """
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]


def _letters_apart(a: str, b: str) -> int:
    ours, theirs = Counter(a), Counter(b)
    return _size(ours - theirs) + _size(theirs - ours)


def _size(counter: Counter[str]) -> int:
    return sum(counter.values())


def _within(value: float, bounds: Iterable[float]) -> bool:
    low, *high = bounds
    return value >= low and (not high or value <= high[0])
