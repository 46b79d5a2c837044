"""Record what rehearsals say of many layouts, and set the planner's memory beside it.

    python benchmarks/rehearsals.py                 # trace every layout that is not recorded: about 25 minutes
    python benchmarks/rehearsals.py tiny_fsdp ...   # trace these again
    python benchmarks/rehearsals.py --table         # write docs/plan_memory.md from the recordings: seconds

Those whose names begin with `ascend` are of an Ascend die's operations, and are traced where torch_npu imports
(`tests/ascend/cann.py`); those that begin with `cuda` are of CUDA's, which are traced anywhere.

Recordings are in tests/unit/planner/rehearsed.json, where tests/unit/planner/test_memory.py holds the planner to
them. Each has the command that says the same. One role is traced at a time, on one thread, in a process of its
own; a role of Pro takes up to a minute of a free core. The planner's model was made beside the layouts that are
not marked `held_out`; those were traced when it was done, and five of them led to repairs (docs/plan.md).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fullweight.planner.chips import chip
from fullweight.planner.recorded import planned
from fullweight.planner.tape import CATEGORIES
from fullweight.rehearse.result import RoleResult
from fullweight.rehearse.routing import Routing
from fullweight.rehearse.run import rehearse
from fullweight.train.config import RunConfig

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "tests" / "unit" / "planner" / "rehearsed.json"
TABLE = ROOT / "docs" / "plan_memory.md"
FLASH, PRO = "recipes/v4_flash_sft_910c_128.toml", "recipes/v4_pro_sft_910c_1024.toml"
TINY, SMALL = "recipes/tiny_smoke.toml", "recipes/small_sft_or.toml"


@dataclass(frozen=True)
class Case:
    """A recipe on so many ranks with some settings changed; `roles` are traced, all where there are none."""

    recipe: str
    ranks: int
    settings: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    held_out: bool = False
    operations: str = "cpu"

    def command(self) -> str:
        changes = "".join(f' --set "{setting}"' for setting in self.settings)
        device = {"cpu": "", "cuda": " --ops cuda", "ascend": " --device npu --ops ascend"}[self.operations]
        return f"fullweight rehearse {self.recipe} --ranks {self.ranks}{device}{changes}"


CASES = {
    "tiny_fsdp": Case(TINY, 2, ("optimizer.name='adamw'", "train.rows_per_step=4"), ()),
    "tiny_experts": Case(TINY, 4, ("optimizer.name='adamw'", "train.rows_per_step=4", "parallel.expert=4"), ()),
    "tiny_hsdp": Case(
        TINY,
        4,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=8",
            "parallel.replicate=2",
            "parallel.expert=2",
            "parallel.recompute='selective'",
        ),
        (),
    ),
    "tiny_pipeline": Case(TINY, 2, ("optimizer.name='adamw'", "train.rows_per_step=6", "parallel.pipeline=2"), ()),
    "tiny_interleaved": Case(
        TINY,
        4,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=8",
            "parallel.pipeline=2",
            "parallel.expert=2",
            "parallel.schedule='interleaved'",
            "parallel.virtual_stages=2",
            "parallel.recompute='full'",
        ),
        (),
    ),
    "tiny_zbv": Case(
        TINY,
        2,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=6",
            "parallel.pipeline=2",
            "parallel.schedule='zbv'",
            "parallel.virtual_stages=2",
        ),
        (),
    ),
    "tiny_zero_bubble": Case(
        TINY,
        2,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=6",
            "parallel.pipeline=2",
            "parallel.schedule='zero_bubble'",
            "parallel.virtual_stages=2",
        ),
        (),
    ),
    "tiny_slices": Case(
        TINY,
        4,
        (
            "optimizer.name='adamw'",
            "data.row_tokens=1024",
            "train.rows_per_step=2",
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.expert=4",
            "parallel.recompute='full'",
        ),
        (),
    ),
    "tiny_offload": Case(
        TINY,
        2,
        (
            "optimizer.name='adamw'",
            "data.row_tokens=512",
            "train.rows_per_step=2",
            "parallel.offload_optimizer=true",
        ),
        (),
    ),
    "tiny_muon": Case(TINY, 1, ("train.rows_per_step=2",), ()),
    "tiny_reshard": Case(
        TINY,
        4,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=8",
            "parallel.pipeline=2",
            "parallel.reshard_after='micro_batch'",
        ),
        (),
    ),
    "flash_910c_128": Case(FLASH, 128, (), ("stage 0", "stage 1", "stage 3")),
    "flash_h100_64": Case("recipes/v4_flash_sft_h100_64.toml", 64, (), ()),
    "flash_h200_64": Case("recipes/v4_flash_sft_h200_64.toml", 64, (), ()),
    "flash_none": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.expert=64",
            "parallel.recompute='none'",
            "data.row_tokens=4096",
        ),
        (),
    ),
    "flash_hsdp": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.expert=64",
            "parallel.replicate=2",
            "parallel.recompute='full'",
            "parallel.offload_optimizer=false",
        ),
        (),
    ),
    "flash_tensor_selective": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.tensor=2",
            "parallel.expert=128",
            "parallel.recompute='selective'",
            "data.row_tokens=4096",
        ),
        (),
    ),
    "flash_slices": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.expert=128",
            "parallel.recompute='selective'",
            "parallel.offload_optimizer=false",
            "train.rows_per_step=64",
        ),
        ("all ranks, last slice",),
    ),
    "flash_interleaved": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=2",
            "parallel.stage_layers=[]",
            "parallel.expert=64",
            "parallel.schedule='interleaved'",
            "parallel.virtual_stages=2",
            "train.rows_per_step=256",
            "data.row_tokens=4096",
        ),
        (),
    ),
    "flash_zbv": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=4",
            "parallel.stage_layers=[]",
            "parallel.schedule='zbv'",
            "parallel.virtual_stages=2",
            "train.rows_per_step=192",
            "data.row_tokens=4096",
        ),
        ("stage 0", "stage 3"),
    ),
    "flash_pipeline8": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=8",
            "parallel.stage_layers=[]",
            "parallel.expert=16",
            "parallel.recompute='selective'",
            "data.row_tokens=2048",
            "train.rows_per_step=160",
        ),
        ("stage 0", "stage 3", "stage 7"),
    ),
    "pro_910c_512": Case("recipes/v4_pro_sft_910c_512.toml", 512, (), ("stage 0", "stage 7")),
    "pro_910c_1024": Case(PRO, 1024, (), ("stage 0", "stage 3", "stage 7")),
    "pro_910c_2048": Case("recipes/v4_pro_sft_910c_2048.toml", 2048, (), ()),
    "pro_context_910c_1024": Case(
        "recipes/v4_pro_sft_context_910c_1024.toml", 1024, (), ("all ranks, last slice",)
    ),
    "pro_h100_256": Case("recipes/v4_pro_sft_h100_256.toml", 256, (), ()),
    "pro_h100_512": Case("recipes/v4_pro_sft_h100_512.toml", 512, (), ()),
    "pro_reshard": Case(
        PRO,
        1024,
        (
            "parallel.pipeline=2",
            "parallel.stage_layers=[]",
            "parallel.reshard_after='micro_batch'",
            "parallel.context=2",
            "parallel.tensor=4",
            "parallel.recompute='none'",
            "parallel.offload_optimizer=false",
        ),
        ("stage 0, first slice", "stage 1, last slice"),
    ),
    "pro_h200_256": Case("recipes/v4_pro_sft_h200_256.toml", 256, (), (), held_out=True),
    "pro_h200_512": Case("recipes/v4_pro_sft_h200_512.toml", 512, (), (), held_out=True),
    # what `fullweight plan` chose first for 512 chips of Ascend 910C
    "pro_two_documents": Case(
        PRO,
        1024,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.tensor=2",
            "parallel.expert=128",
            "parallel.recompute='full'",
            "parallel.offload_optimizer=false",
            "data.row_tokens=8192",
            "train.rows_per_step=512",
        ),
        (),
        held_out=True,
    ),
    "small_odd_pipeline3": Case(
        SMALL,
        3,
        (
            "data.row_tokens=1024",
            "model.changes={vocab_size=4096,index_topk=24,head_dim=80,num_attention_heads=6,o_groups=3,o_lora_rank=44,q_lora_rank=104,index_n_heads=5,index_head_dim=36,moe_intermediate_size=208,n_routed_experts=12,num_experts_per_tok=3}",
            "tokenizer={vocab_size=448}",
            "optimizer.name='adamw'",
            "train.rows_per_step=5",
            "parallel.pipeline=3",
        ),
        (),
        held_out=True,
    ),
    "tiny_hsdp_tensor": Case(
        TINY,
        8,
        (
            "optimizer.name='adamw'",
            "data.row_tokens=512",
            "train.rows_per_step=8",
            "parallel.replicate=2",
            "parallel.tensor=2",
            "parallel.expert=2",
            "parallel.recompute='selective'",
        ),
        (),
        held_out=True,
    ),
    "flash_context_hsdp": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.context=2",
            "parallel.replicate=2",
            "parallel.expert=32",
            "parallel.recompute='full'",
            "data.row_tokens=8192",
        ),
        ("all ranks, last slice",),
        held_out=True,
    ),
    "flash_zero_bubble": Case(
        FLASH,
        128,
        (
            "parallel.pipeline=2",
            "parallel.stage_layers=[]",
            "parallel.virtual_stages=2",
            "parallel.schedule='zero_bubble'",
            "parallel.tensor=2",
            "parallel.expert=32",
            "data.row_tokens=4096",
            "train.rows_per_step=128",
        ),
        ("stage 0", "stage 1"),
        held_out=True,
    ),
    "pro_reshard4": Case(
        PRO,
        1024,
        ("parallel.pipeline=4", "parallel.stage_layers=[]", "parallel.reshard_after='micro_batch'"),
        ("stage 0", "stage 1", "stage 3"),
        held_out=True,
    ),
    "pro_interleaved": Case(
        PRO,
        1024,
        (
            "parallel.pipeline=4",
            "parallel.stage_layers=[]",
            "parallel.schedule='interleaved'",
            "parallel.virtual_stages=2",
            "parallel.recompute='selective'",
            "train.rows_per_step=512",
            "parallel.expert=64",
        ),
        ("stage 1",),
        held_out=True,
    ),
}

# steps of Muon, and experts with a capacity
CASES |= {
    "tiny_muon_fsdp": Case(TINY, 4, ("train.rows_per_step=4", "parallel.expert=2"), ()),
    "tiny_muon_replicas": Case(
        TINY,
        8,
        ("train.rows_per_step=8", "parallel.replicate=2", "parallel.tensor=2", "parallel.expert=2"),
        (),
    ),
    "tiny_muon_pipeline": Case(
        TINY,
        4,
        ("train.rows_per_step=8", "parallel.pipeline=2", "parallel.offload_optimizer=true"),
        (),
    ),
    "flash_muon": Case(
        FLASH,
        128,
        (
            "optimizer.name='muon'",
            "parallel.pipeline=1",
            "parallel.stage_layers=[]",
            "parallel.expert=64",
            "parallel.recompute='full'",
            "data.row_tokens=4096",
        ),
        (),
    ),
    "tiny_capacity": Case(
        TINY,
        4,
        (
            "optimizer.name='adamw'",
            "train.rows_per_step=4",
            "parallel.expert=4",
            "parallel.expert_capacity_factor=0.5",
        ),
        (),
    ),
}

# the operators take heads of 512 channels, and of 128 in the indexer
_HEADS = "model.changes={head_dim=512,index_head_dim=128}"
CASES |= {
    "ascend_tiny_fsdp": Case(
        TINY, 2, ("optimizer.name='adamw'", _HEADS, "train.rows_per_step=4"), (), operations="ascend"
    ),
    "ascend_tiny_pipeline": Case(
        TINY,
        2,
        (
            "optimizer.name='adamw'",
            _HEADS,
            "train.rows_per_step=6",
            "parallel.pipeline=2",
            "parallel.recompute='selective'",
        ),
        (),
        operations="ascend",
    ),
}

# (the layout that is traced with the Ascend operations too, its roles, whether it is held out)
_OF_ASCEND: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "ascend_flash_128": ("flash_910c_128", ("stage 0", "stage 3"), False),
    "ascend_flash_none": ("flash_none", (), False),
    "ascend_flash_slices": ("flash_slices", ("all ranks, last slice",), False),
    "ascend_flash_zero_bubble": ("flash_zero_bubble", ("stage 1",), False),
    "ascend_pro_512": ("pro_910c_512", ("stage 0", "stage 7"), False),
    # what `fullweight plan` chose first for 512 chips of Ascend 910C while it counted a CPU's operations
    "ascend_pro_two_documents": ("pro_two_documents", (), False),
    "ascend_pro_reshard4": ("pro_reshard4", ("stage 3",), True),
}
CASES |= {
    name: replace(CASES[of], roles=roles, held_out=held_out, operations="ascend")
    for name, (of, roles, held_out) in _OF_ASCEND.items()
}

# (the layout that is traced with CUDA's operations too, settings beside its own, roles, whether it is held out)
_OF_CUDA: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], bool]] = {
    "cuda_tiny_fsdp": ("tiny_fsdp", (), (), False),
    "cuda_tiny_pipeline": ("tiny_pipeline", ("parallel.recompute='selective'",), (), False),
    "cuda_tiny_slices": ("tiny_slices", (), (), False),
    "cuda_tiny_zero_bubble": ("tiny_zero_bubble", (), (), False),
    "cuda_small_odd_pipeline3": ("small_odd_pipeline3", (), (), False),
    "cuda_flash_h200_64": ("flash_h200_64", (), (), False),
    "cuda_flash_h200_none": ("flash_h200_64", ("parallel.recompute='none'",), (), False),
    "cuda_flash_h200_selective": ("flash_h200_64", ("parallel.recompute='selective'",), (), False),
    "cuda_flash_slices": ("flash_slices", (), ("all ranks, last slice",), False),
    "cuda_flash_zero_bubble": ("flash_zero_bubble", (), ("stage 1",), False),
    "cuda_pro_h100_256": ("pro_h100_256", (), (), False),
    "cuda_pro_h200_512": ("pro_h200_512", (), (), False),
    "cuda_flash_pipeline8": ("flash_pipeline8", (), ("stage 3", "stage 7"), True),
    "cuda_pro_reshard4": ("pro_reshard4", (), ("stage 3",), True),
    "cuda_tiny_experts": ("tiny_experts", (), (), True),
    "cuda_tiny_hsdp_tensor": ("tiny_hsdp_tensor", (), (), True),
    "cuda_tiny_interleaved": ("tiny_interleaved", (), (), True),
    "cuda_tiny_zbv": ("tiny_zbv", (), (), True),
    "cuda_tiny_muon_replicas": ("tiny_muon_replicas", (), (), True),
    "cuda_flash_interleaved": ("flash_interleaved", (), ("stage 1",), True),
    "cuda_pro_context_1024": ("pro_context_910c_1024", (), ("all ranks, last slice",), True),
}
CASES |= {
    name: replace(
        CASES[of],
        settings=(*CASES[of].settings, *settings),
        roles=roles,
        held_out=held_out,
        operations="cuda",
    )
    for name, (of, settings, roles, held_out) in _OF_CUDA.items()
}


def record(name: str) -> dict[str, Any]:
    """Trace the roles of a case."""
    case = CASES[name]
    device = "npu" if case.operations == "ascend" else "cpu"
    chosen = [] if case.operations == "cpu" else [f"ops.default='{case.operations}'"]
    config = RunConfig.from_toml(ROOT / case.recipe, [*case.settings, *chosen])
    found = rehearse(config, case.recipe, case.ranks, chip("h100"), Routing(), device=device, roles=case.roles)
    return recorded(name, config, found.roles)


def recorded(name: str, config: RunConfig, roles: Sequence[RoleResult]) -> dict[str, Any]:
    """What is kept of a rehearsal: all that the planner has to be asked, and the answers."""
    case = CASES[name]
    layout = config.layout(case.ranks)
    return {
        "name": name,
        "held_out": case.held_out,
        "operations": case.operations,
        "command": case.command(),
        "model": config.model.model_dump(mode="json", include={"preset", "changes"}),
        "row_tokens": config.data.row_tokens,
        "optimizer": config.optimizer.name,
        "parallel": config.parallel.model_dump(mode="json", exclude_defaults=True),
        "ranks": case.ranks,
        "rows_per_step": config.train.rows_per_step,
        "micro_batches": config.train.rows_per_step // layout.data_size,
        "roles": [
            {
                "role": role.role,
                "pipeline": role.coordinates["pipeline"],
                "peak_bytes": role.peak_bytes,
                "most_by_category": role.most_by_category,
                **({"muon": muon(role)} if config.optimizer.name == "muon" else {}),
            }
            for role in roles
        ],
    }


def muon(role: RoleResult) -> dict[str, int]:
    """What the optimiser exchanged, and FLOPs of the only kind of product that nothing but Newton-Schulz makes.

    Two of the three of each iteration: those that are added to something.
    """
    exchanges = [e for e in role.exchanges if e.module == "optimizer" and e.kind == "all_to_all"]
    return {
        "calls": sum(e.count for e in exchanges),
        "bytes_given": sum(e.num_bytes for e in exchanges),
        "baddbmm_flops": role.flops_by_operation["aten.baddbmm"],
    }


def write(found: dict[str, dict[str, Any]]) -> None:
    """In the order of the cases."""
    RECORDS.write_text(json.dumps([found[n] for n in CASES if n in found], indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, dict[str, Any]]) -> str:
    """Every category of every recorded role, as the planner has it and as it was rehearsed."""
    lines = [
        "# The planner's memory beside rehearsals",
        "",
        "Written by `python benchmarks/rehearsals.py --table` from `tests/unit/planner/rehearsed.json`, which has",
        "the command of each layout. GiB, each category at its own worst moment; errors are of the rehearsed.",
        "Layouts marked * were traced when the model was done.",
        "",
        "| layout | role | category | planned | rehearsed | error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for name, one in found.items():
        stages = planned(one)
        for role in one["roles"]:
            stage = stages[role["pipeline"]]
            for category in (*CATEGORIES, "peak"):
                said = role["peak_bytes"] if category == "peak" else role["most_by_category"][category]
                mine = getattr(stage, category)
                if not mine and not said:
                    continue
                error = f"{(mine - said) / said:+.1%}" if said else "-"
                mark = "*" if one["held_out"] else ""
                sizes = f"{mine / 2**30:.6g} | {said / 2**30:.6g}"
                lines.append(f"| {name}{mark} | {role['role']} | {category} | {sizes} | {error} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit status."""
    arguments = sys.argv[1:]
    found = {one["name"]: one for one in json.loads(RECORDS.read_text())} if RECORDS.exists() else {}
    if arguments == ["--table"]:
        TABLE.write_text(table({n: found[n] for n in CASES if n in found}), encoding="utf-8")
        return 0
    unknown = [name for name in arguments if name not in CASES]
    if unknown:
        print(f"no layout {', '.join(unknown)}; there are {', '.join(CASES)}")
        return 1
    os.environ["OMP_NUM_THREADS"] = "1"  # as many partial sums of a weight's gradient
    for name in arguments or [name for name in CASES if name not in found]:
        found[name] = record(name)
        write(found)
        print(f"{name}: {len(found[name]['roles'])} role(s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
