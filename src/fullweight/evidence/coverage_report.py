"""What a measurement of coverage means: sums, findings by name, and whether the run's claim stands.

The claim "full-parameter": every parameter trains by the recipe, and every published tensor of them has elements
that gradients reached and a changed master, but for named exceptions: experts that no token was routed to. Rows of
the embedding that no token used are part of a tensor that is covered, and named too. It is refuted by a tensor
that is not so, an update of low rank, a weight that is not finite, and an export that is not of these weights;
unsupported where the recipe freezes something; not checkable without the first weights. What a recipe freezes has
to be as it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fullweight.evidence.coverage import Coverage
from fullweight.evidence.tensor_coverage import Sums, TensorCoverage

FORMAT = 1
Status = Literal["supported", "refuted", "unsupported", "not checkable"]
Weight = Literal["refutes", "unsupports", "hides", "exception", "note"]
"""What a finding does to the claim; `hides`: something that is needed to judge it is not known."""
_SHOWN = 8
_BY_PLACE = ("first_weights.proof", "first_weights.reason", "first_weights.as_recorded", "export_compared")


@dataclass(frozen=True)
class Finding:
    """Something to know of the named tensors, experts or rows."""

    code: str
    weight: Weight
    text: str
    count: int
    names: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "names": list(self.names)}


def report(coverage: Coverage) -> dict[str, Any]:
    """The content of coverage.json."""
    findings = find(coverage)
    manifest = coverage.generation.manifest
    tensors = coverage.tensors
    trained = sum(t.sums.elements for t in tensors if t.trains)
    return {
        "format": FORMAT,
        "generation": manifest.generation,
        "manifest_sha256": coverage.generation.sha256,
        "step": manifest.facts.step,
        "tokens": manifest.facts.position["tokens"],
        "counted_from_step": coverage.counted_from,
        "parameters": {"total": coverage.num_parameters, "trained": trained},
        "first_weights": {
            "kind": coverage.first.kind,
            "known": coverage.first.reader is not None,
            "proof": coverage.first.proof,
            "reason": coverage.first.reason,
            "as_recorded": coverage.first_as_recorded,
        },
        "export_format": coverage.export_format,
        "export_compared": coverage.export is not None,
        "claim": {"full_parameter": verdict(findings)},
        "findings": [finding.as_dict() for finding in findings],
        "totals": _sum(tensors).as_dict(),
        "kinds": _grouped(tensors, [t.kind for t in tensors]),
        "layers": _grouped(tensors, [t.layer for t in tensors]),
        "experts": _experts(coverage),
        "tokens_by_row": _rows(coverage),
        "tensors": [tensor.as_dict() for tensor in tensors],
        "buffers": [buffer.as_dict() for buffer in coverage.buffers],
    }


def verdict(findings: list[Finding]) -> Status:
    """What the findings leave of the claim "full-parameter"."""
    weights = {finding.weight for finding in findings}
    if "refutes" in weights:
        return "refuted"
    if "unsupports" in weights:
        return "unsupported"
    return "not checkable" if "hides" in weights else "supported"


def find(coverage: Coverage) -> list[Finding]:
    """Everything worth naming, what refutes the claim first."""
    found = [*_of_tensors(coverage), *_of_experts(coverage), *_of_rows(coverage), *_of_export(coverage)]
    if coverage.first.reader is None:
        why = f"the first weights cannot be had: {coverage.first.reason}"
        found.append(Finding("first_weights_unknown", "hides", why, 1))
    if coverage.first_as_recorded is False:
        why = "the first weights that are had again do not have the root that manifest.json recorded"
        found.append(Finding("first_weights_differ", "refutes", why, 1))
    if coverage.routed is None or coverage.seen is None:
        why = "the state does not say how many tokens each expert and each row of the embedding got"
        found.append(Finding("counts_unknown", "hides", why, 1))
    if coverage.counted_from:
        why = f"tokens by expert and by row were counted only after step {coverage.counted_from}"
        found.append(Finding("counted_in_part", "hides", why, 1))
    return sorted(found, key=lambda finding: get_args(Weight).index(finding.weight))


def differences(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """Where a coverage.json says something else than a new measurement of the same generation; empty: nowhere.

    What depends on where it was measured (paths, whether export and manifest were at hand) is left out. Counts,
    names and verdicts must be equal, norms nearly so (other libraries add in another order).
    """
    return _differing(recorded, measured, "")


def _of_tensors(coverage: Coverage) -> list[Finding]:
    known, unrouted = coverage.first.reader is not None, set(_unrouted(coverage))
    held = [t for t in coverage.tensors if not t.trains]
    judged = [t for t in coverage.tensors if t.trains and _expert_of(t) not in unrouted]
    found: list[Finding] = []

    def low(tensor: TensorCoverage) -> bool:
        test = tensor.rank
        return test is not None and test.rank is not None and _tokens_of(tensor, coverage) >= 4 * test.limit

    def named(code: str, weight: Weight, what: str, tensors: Iterable[TensorCoverage]) -> None:
        names = tuple(tensor.name for tensor in tensors)
        if names:
            found.append(Finding(code, weight, _told(names, what), len(names), names))

    wrong = [t for t in coverage.tensors if t.sums.non_finite]
    named("non_finite", "refutes", "hold values that are not finite", wrong)
    unchanged = [t for t in judged if known and t.sums.changed_master == 0]
    named("frozen_tensor", "refutes", "train by the recipe and are as they began", unchanged)
    unreached = [t for t in judged if t.sums.reached == 0]
    named("not_reached", "refutes", "train by the recipe and had no gradient", unreached)
    named("low_rank", "refutes", "changed by a matrix of low rank, as by a merged adapter", filter(low, judged))
    changed = [t for t in held if t.sums.changed_master]
    named("changed_though_frozen", "refutes", "are frozen by the recipe and changed", changed)
    named("declared_frozen", "unsupports", "are frozen by the recipe", held)
    partly = [t for t in judged if 0 < t.sums.reached < t.sums.elements and t.name != "embed.weight"]
    named("partly_reached", "note", "have elements whose moments are zero", partly)
    return [*found, *_of_buffers(coverage)]


def _of_buffers(coverage: Coverage) -> list[Finding]:
    found = []
    tables = [b.name for b in coverage.buffers if b.changed and not b.trains]
    if tables:
        text = _told(tables, "are not trained and changed (other first weights than the run's, or an edit)")
        found.append(Finding("changed_though_frozen", "refutes", text, len(tables), tuple(tables)))
    biases = [b.name for b in coverage.buffers if b.trains and b.changed == 0]
    if biases:
        text = _told(biases, "are router biases that are as they began")
        found.append(Finding("bias_not_moved", "note", text, len(biases), tuple(biases)))
    return found


def _of_experts(coverage: Coverage) -> list[Finding]:
    if coverage.routed is None:
        return []
    names = _unrouted(coverage)
    trained = {_expert_of(t) for t in coverage.tensors if t.trains}
    names = [name for name in names if name in trained]
    if not names:
        return []
    text = _told(names, "had no token routed to them")
    return [Finding("unrouted_experts", "exception", text, len(names), tuple(names))]


def _of_rows(coverage: Coverage) -> list[Finding]:
    embed = next(t for t in coverage.tensors if t.name == "embed.weight")
    if coverage.seen is None or coverage.rows_reached is None or not embed.trains:
        return []
    unseen = (coverage.seen == 0).nonzero().flatten().tolist()
    silent = ((coverage.seen > 0) & ~coverage.rows_reached).nonzero().flatten().tolist()
    found, rows = [], len(coverage.seen)
    if unseen:
        text = f"{len(unseen):,} of {rows:,} rows of embed.weight had no token in the data: {_few(unseen)}"
        found.append(Finding("unseen_rows", "exception", text, len(unseen)))
    if silent:
        text = (
            f"{len(silent):,} rows of embed.weight had tokens, and moments that are zero (their last gradient is "
            f"too long ago, or only documents end in them): {_few(silent)}"
        )
        found.append(Finding("seen_not_reached", "note", text, len(silent)))
    return found


def _of_export(coverage: Coverage) -> list[Finding]:
    if coverage.export_error is not None:
        why = f"the export is not a whole model: {coverage.export_error}"
        return [Finding("export_not_whole", "refutes", why, 1)]
    if not coverage.export:
        return []
    names = coverage.export
    what = "are exported with other values than these weights give"
    if coverage.export_first == len(names):
        what = "are exported as the run began, not as it trained them"
    return [Finding("export_differs", "refutes", _told(names, what), len(names), tuple(names))]


def _told(names: Sequence[str], what: str) -> str:
    return f"{len(names):,} {what}: {_few(names)}"


def _few(values: Sequence[Any]) -> str:
    more = f", and {len(values) - _SHOWN:,} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more


def _expert_of(tensor: TensorCoverage) -> str | None:
    """`layers.3.ffn.experts.7` of one of its matrices."""
    return None if tensor.expert is None else tensor.name.rsplit(".", 2)[0]


def _tokens_of(tensor: TensorCoverage, coverage: Coverage) -> int:
    """Tokens that made a tensor's gradients: of a few tokens no more directions than tokens can come."""
    if tensor.expert is not None and coverage.routed is not None and not coverage.counted_from:
        return int(coverage.routed[_layer_names(coverage).index(tensor.layer), tensor.expert])
    return int(coverage.generation.manifest.facts.position["tokens"])


def _layer_names(coverage: Coverage) -> list[str]:
    """The layers with experts, in the order of the rows of `routed`."""
    config = coverage.config
    layers = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    return layers + [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]


def _unrouted(coverage: Coverage) -> list[str]:
    """Experts that no token reached, where that was counted from the first step."""
    if coverage.routed is None or coverage.counted_from:
        return []
    return [
        f"{layer}.ffn.experts.{expert}"
        for layer, counts in zip(_layer_names(coverage), coverage.routed.tolist(), strict=True)
        for expert, count in enumerate(counts)
        if count == 0
    ]


def _experts(coverage: Coverage) -> list[dict[str, Any]]:
    grouped: dict[str, list[TensorCoverage]] = {}
    for tensor in coverage.tensors:
        if (expert := _expert_of(tensor)) is not None:
            grouped.setdefault(expert, []).append(tensor)
    routed: dict[str, int] = {}
    if coverage.routed is not None:
        for layer, counts in zip(_layer_names(coverage), coverage.routed.tolist(), strict=True):
            routed |= {f"{layer}.ffn.experts.{i}": count for i, count in enumerate(counts)}
    return [
        {"name": name, "routed_tokens": routed.get(name), **_sum(tensors).as_dict()}
        for name, tensors in grouped.items()
    ]


def _rows(coverage: Coverage) -> dict[str, Any] | None:
    """How the tokens fell on the rows of the embedding."""
    if coverage.seen is None or coverage.rows_reached is None:
        return None
    return {
        "rows": len(coverage.seen),
        "seen": int((coverage.seen > 0).sum()),
        "reached": int(coverage.rows_reached.sum()),
        "tokens": int(coverage.seen.sum()),
    }


def _sum(tensors: list[TensorCoverage]) -> Sums:
    total = Sums()
    for tensor in tensors:
        total.add(tensor.sums)
    return total


def _grouped(tensors: list[TensorCoverage], keys: list[str]) -> dict[str, Any]:
    groups: dict[str, list[TensorCoverage]] = {}
    for key, tensor in zip(keys, tensors, strict=True):
        groups.setdefault(key, []).append(tensor)
    return {key: {"tensors": len(group), **_sum(group).as_dict()} for key, group in groups.items()}


def _differing(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [d for key in keys for d in _differing(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{where}: {len(a)} entries, measured {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differing(x, y, _item(where, i, x))]
    return [] if where in _BY_PLACE or _same(a, b, where) else [f"{where}: {a!r}, measured {b!r}"]


def _same(a: Any, b: Any, where: str) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= (1e-3 if where.endswith("residual") else 1e-5 * max(abs(a), abs(b)))
    return type(a) is type(b) and bool(a == b)


def _item(where: str, index: int, value: Any) -> str:
    name = value.get("name", index) if isinstance(value, dict) else index
    return f"{where}[{name}]"
