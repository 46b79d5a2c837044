"""Whether the versions of Python, torch, the vendor's software and its driver go together.

`compatibility.toml` says which do, and from where. What the vendor calls incompatible is an error, and so is an
absent part; a version that no table names is a warning. Imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from fullweight.doctor.facts import Facts, Versions
from fullweight.doctor.findings import Finding, Severity

_ERROR, _WARNING, _NOTE = Severity.error, Severity.warning, Severity.note
_INSTALL = "install CANN and the driver as docs/ascend.md says, and source set_env.sh"


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Findings on the versions of one machine."""
    found = facts.versions
    required = found.torch_required
    if required and _base(found.torch) != required:
        yield Finding(
            _WARNING,
            "torch",
            found.torch,
            required,
            f"fullweight is tested with torch {required} alone; install it, or see that the tests pass",
        )
    if facts.device == "ascend":
        yield from _ascend(found)
    elif facts.device == "cuda":
        yield from _cuda(found)


def _ascend(found: Versions) -> Iterator[Finding]:
    if found.npu_torch is None:
        yield Finding(_ERROR, "torch_npu", "none", "the torch_npu of torch's version", "pip install torch_npu")
        return
    row = _row("torch_npu", found.npu_torch)
    if _series(found.torch) != _series(found.npu_torch):
        yield Finding(
            _ERROR,
            "torch_npu",
            f"{found.npu_torch} with torch {found.torch}",
            "the same first two numbers",
            f"its libraries are built against one torch; pip install 'torch_npu=={_base(found.torch)}.*'",
        )
    elif row is None:
        known = ", ".join(r["version"] for r in _table()["torch_npu"])
        yield Finding(_WARNING, "torch_npu", found.npu_torch, known, "no table of versions names it")
    if row is not None and _series(found.python) not in row["python"]:
        fix = "make the environment with one of them"
        yield Finding(_ERROR, "python", found.python, " or ".join(row["python"]), fix)
    if found.torch_cuda is not None:
        expected, fix = "a torch built for CPUs", "torch and torch_npu must not both bring an accelerator"
        yield Finding(_WARNING, "torch", f"{found.torch}, built for CUDA {found.torch_cuda}", expected, fix)
    yield from _cann(found, row)


def _cann(found: Versions, row: dict[str, Any] | None) -> Iterator[Finding]:
    if found.driver is None:
        yield Finding(_ERROR, "driver", "none", "an Ascend HDK driver", _INSTALL)
    if found.cann is None:
        yield Finding(_ERROR, "cann", "none (ASCEND_HOME_PATH leads to none)", "CANN", _INSTALL)
        return
    series = _series(found.cann)
    if row is not None and series not in row["cann"]:
        compatible = series in row["also"]
        yield Finding(
            _WARNING if compatible else _ERROR,
            "cann",
            f"{found.cann} with torch_npu {found.npu_torch}",
            " or ".join(f"{c}.x" for c in row["cann"]),
            "said to be compatible, but not what it was made with; upgrade" if compatible else _INSTALL,
        )
        if not compatible:
            return  # a driver is for a CANN that can stay
    if found.driver is not None:
        yield from _driver(found.driver, found.cann)


def _driver(driver: str, cann: str) -> Iterator[Finding]:
    """A pair that no table names is unknown, which is not compatible: it has to be accepted."""
    pair = _row("cann", cann) or {"driver": [], "not": []}
    if _series(driver) in pair["driver"]:
        return
    refused = _series(driver) in pair["not"]
    found = f"{driver} with CANN {cann}"
    yield Finding(
        _ERROR if refused else _WARNING,
        "driver",
        found if refused else f"{found}: unknown whether they go together",
        " or ".join(f"{d}.x" for d in pair["driver"]) or "a pair that a table of versions names",
        "change the driver, or CANN" if refused else "see the vendor's table, which may be newer; or change one",
    )


def _cuda(found: Versions) -> Iterator[Finding]:
    if found.torch_cuda is None:
        yield Finding(_ERROR, "torch", f"{found.torch}, built for CPUs", "a torch built for CUDA", "install one")
        return
    row = next((r for r in _table()["cuda"] if r["version"] == found.torch_cuda.split(".")[0]), None)
    if found.driver is None:
        yield Finding(_ERROR, "driver", "none", "an NVIDIA driver", "install it; `nvidia-smi` must work")
    elif row is not None and _numbers(found.driver) < _numbers(row["driver_at_least"]):
        yield Finding(
            _ERROR,
            "driver",
            f"{found.driver} with CUDA {found.torch_cuda}",
            f"at least {row['driver_at_least']}",
            "upgrade the driver, or install a torch built for an older CUDA",
        )


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = resources.files(__package__).joinpath("compatibility.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _row(kind: str, version: str) -> dict[str, Any] | None:
    return next((row for row in _table()[kind] if row["version"] == _series(version)), None)


def _base(version: str) -> str:
    return re.split(r"[+]|\.post|rc|\.dev", version)[0]


def _series(version: str) -> str:
    """The first two numbers.

    >>> _series("9.1.0-beta.3"), _series("26.0.RC1"), _series("2.13.0+cpu")
    ('9.1', '26.0', '2.13')
    """
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
