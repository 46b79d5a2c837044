"""The doctor against torch_npu itself: its table has every variable that the package reads, its facts are read."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from fullweight.devices import find
from fullweight.doctor.applied import vetted
from fullweight.doctor.compare import check_job
from fullweight.doctor.environment import misspelt, variables
from fullweight.doctor.facts import Job
from fullweight.doctor.findings import Severity
from fullweight.doctor.gather import gather_facts

from .cann import CHIP, DIES

PREFIXES = ("HCCL_", "P2P_HCCL_", "TORCH_HCCL_", "TORCH_NPU_", "NPU_ASD_", "PYTORCH_NPU_", "INF_NAN_MODE_")


def read_by_torch_npu() -> set[str]:
    """Whole strings of its libraries, and names that its Python files look up, that begin as variables do."""
    spec = find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    found: set[str] = set()
    for library in (*package.glob("lib/*.so"), *package.glob("_C*.so")):
        found |= {m.decode() for m in re.findall(rb"(?<=\0)([A-Z][A-Z0-9_]{5,60})(?=\0)", library.read_bytes())}
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        found |= set(re.findall(r"(?:environ(?:\.get)?[(\[]|getenv\()\s*[\"']([A-Z][A-Z0-9_]+)[\"']", text))
    return {name for name in found if name.startswith(PREFIXES)}


def test_every_variable_of_torch_npu_is_known() -> None:
    """No name that the package reads is missing from the table, or taken for a misspelling."""
    names = read_by_torch_npu()
    assert len(names) > 40
    assert sorted(names - variables().keys()) == []
    assert [n for n in names & variables().keys() if misspelt(n, "ascend")] == []


def test_vetted_variables_are_read_by_someone() -> None:
    """What torch_npu does not read itself is HCCL's."""
    names = set(vetted()["ascend-910c"]["variables"])
    ours = {n for n in names if not n.startswith("HCCL_")}
    spec = find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    text = b"".join(p.read_bytes() for p in Path(spec.origin).parent.glob("lib/*.so"))
    assert [n for n in ours if n.encode() not in text] == []


def test_facts_of_a_node_without_cann_and_driver(tmp_path: Path) -> None:
    """Sixteen dies are seen; what the stand-in lacks is named, and nothing else is."""
    device = find("ascend")
    facts = gather_facts("ascend", device, run_folder=tmp_path, asked="ascend")
    assert facts.devices.count == DIES
    assert facts.devices.chips == (CHIP,) * DIES
    assert facts.devices.per_chip == 2
    assert facts.versions.npu_torch is not None
    assert facts.versions.npu_torch.startswith("2.13")
    found = check_job(Job(ranks=1, machines=(facts,)))
    assert {f.name for f in found if f.severity is Severity.error} == {"cann", "driver"}
