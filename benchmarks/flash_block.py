"""A training step at the widths of Flash on one device: `python benchmarks/flash_block.py OUT.json [TOKENS]`.

Four layers (sliding, CSA, HCA, CSA) and the MTP block of Flash with 16 experts and a vocabulary of 16,384
(`flash_block.json`), so that fp32 masters, gradients and AdamW's moments fit one accelerator. The step is the
trainer's own. Each operation is then run again alone, forward and backward, on what the step gave it; the sum of
these is not the step's time, which makes some results again and overlaps nothing. Weights are drawn here,
plainly; losses only show that it learns.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullweight.core.types import Batch, PackedLayout
from fullweight.devices import find
from fullweight.methods.sft import Pretrain
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.flops import training_flops
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import implementations, resolve_operations
from fullweight.ops.reference import GROUPS, Compressed, ReferenceOperations, Workload
from fullweight.optim.groups import OptimizerConfig, build_optimizers
from fullweight.parallel.engine import PlainEngine
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard, GuardConfig
from fullweight.train.peak import matmul_rates
from fullweight.train.step import LossConfig, Phases, training_step

REPEATS = 5
CONFIG = Path(__file__).with_suffix(".json")


class Recorder(ReferenceOperations):
    """`base`, which remembers one call of each method and shape while `on`, and how many there were."""

    def __init__(self, base: ReferenceOperations) -> None:
        self.name, self.base, self.on = base.name, base, False
        self.calls: dict[tuple[str, ...], list[Any]] = {}
        for group, methods in GROUPS.items():
            for method in methods:
                setattr(self, method, self._recorded(group, method))

    def part(self, group: str) -> ReferenceOperations:
        return self.base.part(group)

    def _recorded(self, group: str, method: str) -> Callable[..., Any]:
        function = getattr(self.base, method)

        def call(*inputs: Any) -> Any:
            if self.on:
                sizes = [_sizes(x) for x in inputs]
                self.calls.setdefault((group, method, str(sizes)), [0, function, inputs])[0] += 1
            return function(*inputs)

        return call


def _sizes(x: Any) -> Any:
    if isinstance(x, Compressed):
        return list(x.entries.shape), None if x.selected is None else list(x.selected.shape)
    return list(x.shape) if isinstance(x, Tensor) else None


def draw(model: DeepSeekV4, device: torch.device) -> None:
    """Weights of a plain kind; hash tables that spread tokens evenly."""
    generator = torch.Generator(device=device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(1.0 if "norm" in name else 0.01 if "scale" in name else 0.0)
    for table in model.buffers():
        if table.dim() == 2 and not table.is_floating_point():
            first = torch.arange(table.shape[0], device=device).unsqueeze(1) * table.shape[1]
            table.copy_((first + torch.arange(table.shape[1], device=device)) % model.config.n_routed_experts)


def alone(function: Callable[..., Any], inputs: tuple[Any, ...], wait: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of one call and of its backward pass."""
    times = []
    for _ in range(REPEATS):
        fresh = [_leaf(x) for x in inputs]
        wait()
        start = time.perf_counter()
        result = function(*fresh)
        wait()
        between = time.perf_counter()
        results = (
            [result]
            if isinstance(result, Tensor)
            else result
            if isinstance(result, tuple)
            else vars(result).values()
        )
        wanted = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
        wait()
        times.append((between - start, time.perf_counter() - between))
    forward, backward = (statistics.median(part) for part in zip(*times[1:], strict=True))
    return forward, backward


def _leaf(x: Any) -> Any:
    if isinstance(x, Compressed):
        return Compressed(_leaf(x.entries), x.table, x.selected)
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def main(out: Path, tokens: int) -> None:
    kind = find("auto")
    device = kind.device(0)
    config = DeepSeekV4Config.from_file(CONFIG)
    peak = max(rate.flops_per_second for rate in matmul_rates(device))
    heads, index = config.num_attention_heads, (config.index_n_heads, config.index_head_dim, config.index_topk)
    workload = Workload(torch.bfloat16, heads, config.head_dim, *index)
    operations = Recorder(resolve_operations("auto", kind.type, None, workload))
    model = DeepSeekV4(config, torch.bfloat16, ops=operations).to(device)
    draw(model, device)
    settings = OptimizerConfig(name="adamw", learning_rate=1e-4)
    optimizers = build_optimizers(model, model.parameter_roles(), settings)
    lengths = [tokens // 2, tokens // 4, tokens // 4]
    row = torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    batch = Batch(row, torch.ones(tokens), PackedLayout.build(lengths, config.ratios)).to(device)
    guard, engine, ranks = Guard(GuardConfig()), PlainEngine(model), Ranks(0, 1, device)

    def step() -> dict[str, float]:
        phases = Phases(device)
        training_step(
            model, Pretrain(), optimizers, [batch], engine=engine, losses=LossConfig(),
            clip_norm=settings.clip_norm, guard=guard, ranks=ranks, phases=phases,
        )  # fmt: skip
        return phases.seconds

    step()  # compiles
    kind.reset_peak()
    steps = [step() for _ in range(REPEATS)]
    totals = [sum(seconds.values()) for seconds in steps]
    middle, memory = statistics.median(totals), kind.memory().peak
    operations.on = True
    step()
    operations.on = False
    rows = []
    for (group, method, sizes), (count, function, inputs) in operations.calls.items():
        forward, backward = alone(function, inputs, kind.synchronize)
        rows.append({"group": group, "operation": method, "inputs": sizes, "calls": count}
                    | {"forward_seconds": forward, "backward_seconds": backward})  # fmt: skip
    flops = training_flops(config, lengths).total
    record = {
        "device": kind.chip(),
        "torch": torch.__version__,
        "config": f"benchmarks/{CONFIG.name}",
        "tokens": tokens,
        "operations": implementations(operations.base),
        "step_seconds": middle,
        "spread": (max(totals) - min(totals)) / middle,
        "phases": {name: statistics.median(s[name] for s in steps) for name in steps[0]},
        "flops": flops,
        "matmul_flops_per_second": peak,
        "share_of_matmul": flops / middle / peak,
        "peak_bytes": memory,
        "alone": rows,
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{tokens} tokens: {middle * 1e3:.0f} ms, {record['share_of_matmul']:.1%} of the matmul peak")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4096)
