"""Write docs/parity.md: how far the model is from transformers, configuration by configuration.

    python benchmarks/parity_table.py [docs/parity.md]

The configurations, the comparison and the bounds are those of tests/unit/models/test_parity.py; this only
prints what they measure. Takes about a minute on two cores. Needs the development install (transformers).
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.models import test_parity as bounds  # noqa: E402
from tests.unit.models.cases import BF16_CASES, Case, cases  # noqa: E402
from tests.unit.models.parity import measure, measure_bfloat16  # noqa: E402

from fullweight.ops import available_operations  # noqa: E402

INTRODUCTION = """# Parity with transformers

Written by `python benchmarks/parity_table.py`; the same comparison is part of `make test`
(`tests/unit/models/test_parity.py`). `fullweight parity` makes it on a checkpoint of yours and names the first
module that differs: [comparing](compare.md#our-model-beside-transformers).

Each row is a random small configuration with random weights that leave no part idle. Its documents go through
our model in one pack, and through `DeepseekV4ForCausalLM` (eager) each in a call of its own. A name reads: number,
layers, hash-routed layers, output groups, hyper-connection streams.

- **Logits**: largest difference relative to the largest logit, the worst document. Bound: {logits:g}.
- **Gradient**: relative norm of the difference, the worst of all parameters that transformers trains (it has no
  MTP block and does not train the indexer). Bound: {gradient:g}. A gradient that is itself below a millionth of
  the whole is rounding and is held to that absolutely.
- Documents on which a choice of experts or entries is closer than 1e-5 are drawn again: there rounding decides.

MTP, the indexer's loss in both scopes, the balance loss and all their gradients are compared with dense formulas
in float64 (`tests/unit/models/reference.py`, `test_losses.py`): losses within 2e-5, gradients within 2e-4 in fp32;
in float64, where only the fp32 rotary tables round, 1e-7 and 2e-6.
"""

BF16 = """
## bf16

Each side's bf16 against its own fp32, from the same bf16 weights, relative to the logits' root mean square (the
gradient: to its norm). Bounds: the typical (median) token {token:.0%} and {factor:g} times transformers' own; root
mean square and gradient {mean:g} times, since they are ruled by the few tokens whose expert or entry flips, on
either side.

| configuration | run by | typical token | root mean square | gradient |
|---|---|---|---|---|
"""


def fp32_table() -> list[str]:
    names = available_operations()
    columns = [f"logits, {name} | gradient, {name}" for name in names]
    lines = [f"| configuration | documents | {' | '.join(columns)} | parameters |"]
    lines.append("|---" * (3 + 2 * len(names)) + "|")
    for case in cases():
        errors = [measure(case, name) for name in names]
        cells = [f"{e.logits:.1e} | {e.gradient:.1e}" for e in errors]
        lines.append(f"| {case} | {lengths(case)} | {' | '.join(cells)} | {errors[0].num_parameters} |")
    return lines


def lengths(case: Case) -> str:
    shown = ", ".join(map(str, case.lengths[:6]))
    return shown if len(case.lengths) <= 6 else f"{shown} and {len(case.lengths) - 6} more"


def bf16_rows() -> list[str]:
    rows = []
    for number in BF16_CASES:
        with tempfile.TemporaryDirectory() as folder:
            for name, e in measure_bfloat16(cases()[number], Path(folder) / "model").items():
                figures = f"{e.typical_token:.2%} | {e.mean_square:.2%} | {e.gradient:.2%}"
                rows.append(f"| {cases()[number]} | {name} | {figures} |")
    return rows


def provenance() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "tests/unit/models")
    state = git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    where = f"Python {platform.python_version()}, {platform.machine()}"
    return f"\nMeasured {datetime.now(UTC):%Y-%m-%d} at commit {state}; {versions}, {where}, one thread.\n"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "parity.md"
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    text = INTRODUCTION.format(logits=bounds.LOGITS, gradient=bounds.GRADIENT) + "\n## fp32\n\n"
    text += "\n".join(fp32_table()) + "\n"
    factors = {"factor": bounds.BF16_TYPICAL_FACTOR, "mean": bounds.BF16_MEAN_FACTOR}
    text += BF16.format(token=bounds.BF16_TYPICAL_TOKEN, **factors) + "\n".join(bf16_rows()) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + provenance(), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
