"""One measurement in one fresh process: `python -m fullweight.bench.worker KIND LENGTH < config.json`.

A fresh process for each, because peak memory is a high-water mark and because an allocator's history or a
library's threads must not leak from one measurement into the next. The last line of stdout is the result as
JSON; a user's mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from fullweight.bench.measure import BenchConfig, measure_matmul
from fullweight.core.errors import FullweightError


def measure(kind: str, config: BenchConfig, length: int) -> dict[str, Any]:
    """Run one measurement here; imports only what its kind needs, so that baselines are fair."""
    torch.set_num_threads(config.threads)
    if kind == "matmul":
        return asdict(measure_matmul())
    if kind == "transformers":
        from fullweight.bench.transformers_bench import measure_transformers  # noqa: PLC0415

        return asdict(measure_transformers(config, length))
    from fullweight.bench.model_bench import measure_fullweight  # noqa: PLC0415

    return asdict(measure_fullweight(config, length))


def main() -> None:
    kind, length = sys.argv[1], int(sys.argv[2])
    try:
        result = measure(kind, BenchConfig.resolve(json.load(sys.stdin)), length)
    except FullweightError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
