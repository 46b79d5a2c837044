"""Training steps under a layout of ranks, on rows made to be awkward, and what came of them.

`run_cases` is what each rank of a launch runs: every case, one after the other in one process group, with the
parts that a real run has (`assemble`, `training_step`). The rows are handed to it here and not read from data,
because data is too even: documents of one token beside documents of a whole row, documents that cross every
boundary between slices, and as the last micro-batch a row that is almost all padding, whose tokens go to few
experts, so that others get none on some ranks.

A case is a number of ranks and recipe settings. To cover another layout, add a line to `CASES`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests.processes import ROOT
from torch import Tensor
from torch.distributed.tensor import DTensor

from fullweight.core.config import apply_overrides, read_toml
from fullweight.core.types import Batch, PackedLayout
from fullweight.devices import find
from fullweight.parallel.deterministic import deterministic
from fullweight.parallel.mesh import Ranks, joined
from fullweight.train.assemble import Run, assemble
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder
from fullweight.train.step import Phases, StepResult, training_step

STEPS = 10
ROWS = 4
SETTINGS = (
    f"train.num_steps={STEPS}",
    f"train.rows_per_step={ROWS}",
    "train.precision=fp64",
    "optimizer.muon.ns_dtype=float64",
    "train.peak_flops_per_second=1e12",
    "optimizer.learning_rate=3e-4",
    "optimizer.adamw.eps=1e-5",
    "eval.num_samples=0",
    # few samples: the rows are made here
    "data.sources=[{kind='synth', synth={seed=1, num_samples=40, mixture={warm-up=1}}}]",
    "tokenizer.num_samples=40",
    "tokenizer.vocab_size=320",
)


@dataclass(frozen=True)
class Case:
    """A layout: `ranks` and `settings` as in `--set`; `tokens` of a row; `slow` ones run in `make test-slow`."""

    ranks: int
    settings: tuple[str, ...] = ()
    tokens: int = 256
    slow: bool = True


def _case(ranks: int, *, tokens: int = 256, slow: bool = True, **parallel: Any) -> Case:
    return Case(ranks, tuple(f"parallel.{k}={json.dumps(v)}" for k, v in parallel.items()), tokens, slow)


HASHED = ("model.changes.num_hash_layers=3",)
# About every twelfth choice finds its expert full.
TIGHT = ("parallel.expert_capacity_factor=0.9",)


def _tight(ranks: int, **options: Any) -> Case:
    case = _case(ranks, **options)
    return replace(case, settings=(*TIGHT, *case.settings))


# Six experts on two or four shards of the same: AdamW lets the rows of their matrices be cut instead.
UNEVEN = ("optimizer.name=adamw", "model.changes.n_routed_experts=6")

# Five on two shards, each copied once: Muon leaves them whole, three and two, and AdamW has rows cut.
FIVE = ("model.changes.n_routed_experts=5",)

CASES: dict[str, Case] = {
    "one": Case(1, slow=False),
    "one-512": Case(1, tokens=512),
    "fsdp2": _case(2),
    "fsdp4": _case(4),
    "ep2": _case(2, expert=2),
    "hsdp2x2": _case(4, replicate=2, slow=False),
    "ddp4": _case(4, replicate=4),
    "ep4": _case(4, expert=4),
    "fsdp2-ep2": _case(4, expert=2, slow=False),
    "hsdp2-ep2": _case(4, replicate=2, expert=2),
    "pp2": _case(2, pipeline=2, slow=False),
    "pp2-zbv": _case(2, pipeline=2, schedule="zbv", virtual_stages=2, slow=False),
    "pp2-interleaved": _case(2, pipeline=2, schedule="interleaved", virtual_stages=2),
    "pp2-zero-bubble": _case(2, pipeline=2, schedule="zero_bubble", virtual_stages=2),
    "pp2-uneven": _case(2, pipeline=2, stage_layers=[1, 3]),
    "pp4": _case(4, pipeline=4),
    "pp2-fsdp2": _case(4, pipeline=2),
    "pp2-fsdp2-reshard": _case(4, pipeline=2, reshard_after="micro_batch"),
    "pp2-hsdp2-reshard-recompute": _case(
        4, pipeline=2, replicate=2, reshard_after="micro_batch", recompute="full"
    ),
    "pp2-tp2-reshard": _case(4, pipeline=2, tensor=2, reshard_after="micro_batch"),
    "pp2-fsdp2-cp2-ep2-reshard": _case(8, pipeline=2, context=2, expert=2, reshard_after="micro_batch"),
    "pp2-ep2": _case(4, pipeline=2, expert=2),
    "pp2-hsdp2": _case(4, pipeline=2, replicate=2),
    "pp2-zbv-ep2-recompute": _case(4, pipeline=2, schedule="zbv", virtual_stages=2, expert=2, recompute="full"),
    "cp2": _case(2, context=2),
    "cp4": _case(4, context=4, tokens=512),
    "tp2": _case(2, tensor=2),
    "cp2-tp2": _case(4, context=2, tensor=2, tokens=512),
    "tp2-ep2": _case(2, tensor=2, expert=2, slow=False),
    "cp2-ep2": _case(2, context=2, expert=2),
    "fsdp2-cp2": _case(4, context=2),
    "fsdp2-tp2": _case(4, tensor=2),
    "hsdp2-cp2-recompute": _case(4, replicate=2, context=2, recompute="full"),
    "hsdp2-tp2": _case(4, replicate=2, tensor=2),
    "pp2-cp2": _case(4, pipeline=2, context=2),
    "pp2-tp2": _case(4, pipeline=2, tensor=2),
    "pp2-zbv-cp2-ep2": _case(4, pipeline=2, schedule="zbv", virtual_stages=2, context=2, expert=2),
    "fsdp4-cp2-ep4": _case(8, context=2, expert=4),
    "pp2-fsdp2-tp2-ep4": _case(8, pipeline=2, tensor=2, expert=4),
    "fsdp2-ep2-recompute": _case(4, expert=2, recompute="full", deterministic=True),
    "ep2-recompute": _case(2, expert=2, recompute="selective", deterministic=True),
    "fsdp2-bf16-wire": _case(2, reduce_dtype="bf16"),
    # token ids are read by layers behind the first stage
    "hashed": Case(1, HASHED),
    "hashed-pp4": Case(4, (*HASHED, "parallel.pipeline=4")),
    "hashed-pp2-cp2": Case(4, (*HASHED, "parallel.pipeline=2", "parallel.context=2")),
    "capacity": Case(1, TIGHT, slow=False),
    "capacity-512": Case(1, TIGHT, tokens=512),
    "capacity-fsdp2": _tight(2),
    "capacity-cp2-ep2": _tight(2, context=2, expert=2, slow=False),
    "capacity-tp2": _tight(2, tensor=2),
    "capacity-pp2-zbv-ep2": _tight(4, pipeline=2, schedule="zbv", virtual_stages=2, expert=2),
    "capacity-fsdp2-cp2-tp2-ep8-recompute": _tight(8, context=2, tensor=2, expert=8, recompute="full", tokens=512),
    "uneven": Case(1, UNEVEN, slow=False),
    "uneven-fsdp2-ep2": Case(4, (*UNEVEN, "parallel.expert=2"), slow=False),
    "uneven-fsdp4": Case(4, UNEVEN),
    "uneven-muon": Case(1, FIVE),
    "uneven-muon-hsdp2x2": Case(4, (*FIVE, "parallel.replicate=2")),
    "uneven-adamw": Case(1, (*FIVE, "optimizer.name=adamw")),
    "uneven-adamw-hsdp2x2": Case(4, (*FIVE, "optimizer.name=adamw", "parallel.replicate=2")),
    "uneven-muon-pp2-fsdp2": Case(4, (*FIVE, "parallel.pipeline=2")),
    "uneven-fsdp4-ep2-cp2": Case(8, (*UNEVEN, "parallel.context=2", "parallel.expert=2")),
}
# Cases that differ in nothing that may change a bit.
SAME_BITS = {"fsdp2-ep2-recompute": "fsdp2-ep2", "ep2-recompute": "ep2"}
# Cases that are less exact on purpose; they have tests of their own.
INEXACT = ("fsdp2-bf16-wire",)


# The same in fp32, with the compiled operations. Every visible entry is selected there: which of two nearly equal
# scores is the larger is decided by rounding, and with it a visible part of a small indexer loss.
FP32 = ("train.precision=fp32", "optimizer.muon.ns_dtype=float32", "model.changes={index_topk=128}")
ALONE = ("fsdp2", "ep2", "hsdp2x2", "pp2", "pp2-zbv", "pp2-interleaved", "pp2-zero-bubble", "cp2", "tp2")
MIXED = ("fsdp2-ep2", "hsdp2-ep2", "pp2-fsdp2", "pp2-ep2", "cp2-tp2", "tp2-ep2", "cp2-ep2", "fsdp2-cp2")
MIXED += ("fsdp2-tp2", "pp2-cp2", "pp2-tp2", "pp2-zbv-cp2-ep2")
CASES |= {
    f"{name}-fp32": replace(CASES[name], settings=(*FP32, *CASES[name].settings), slow=True)
    for name in ("one", "one-512", *ALONE, *MIXED)
}


@dataclass(frozen=True)
class Found:
    """What a case came to: per step the losses, the norm and the counts; the weights before and after."""

    steps: list[dict[str, Any]]
    first: dict[str, Tensor]
    last: dict[str, Tensor]


def found(folder: Path, name: str) -> Found:
    """Read back what `run_cases` wrote."""
    return Found(**torch.load(folder / f"{name}.pt"))


def run_cases(arguments: list[str]) -> int:
    """On every rank: the named cases, all of this many ranks; rank 0 writes one file for each into the folder."""
    folder, *names = arguments
    with joined("cpu") as ranks:
        for name in names:
            with deterministic(recipe(CASES[name]).parallel.deterministic, find("cpu")):
                result = _train(CASES[name], ranks)
            if ranks.is_main:
                torch.save(result, Path(folder) / f"{name}.pt")
        ranks.barrier()
    return 0


def _train(case: Case, ranks: Ranks) -> dict[str, Any]:
    config = recipe(case)
    run = assemble(config, RunFolder(Path("never-written")), ranks)
    first, steps = whole_weights(run), []
    try:
        for step in range(STEPS):
            result = take_step(run, step)
            steps.append(
                {
                    "losses": result.losses,
                    "grad_norm": result.grad_norm,
                    "tokens": (result.num_tokens, result.num_padding, result.num_trained),
                    "expert_counts": result.expert_counts,
                    "dropped": result.num_dropped,
                    "without_gradient": result.without_gradient,
                    "unseen": result.num_unseen_embeddings,
                }
            )
    finally:
        run.state.loader.close()
    return {"steps": steps, "first": first, "last": whole_weights(run)}


def take_step(run: Run, step: int) -> StepResult:
    """One step on the awkward rows of that number; all ranks together."""
    config = run.config
    rows = awkward_rows(step, config.data.row_tokens, run.architecture.vocab_size, run.architecture.ratios)
    result = training_step(
        run.model,
        config.method,
        run.state.optimizers,
        rows[run.ranks.data_rank :: run.ranks.data_size],
        engine=run.engine,
        losses=config.train.loss,
        clip_norm=config.optimizer.clip_norm,
        guard=run.guard,
        ranks=run.ranks,
        phases=Phases(run.ranks.device),
    )
    assert result.refusal is None
    return result


def recipe(case: Case, *more: str) -> RunConfig:
    """The smoke recipe with a case's settings."""
    settings = (*SETTINGS, f"data.row_tokens={case.tokens}", *case.settings, *more)
    return RunConfig.resolve(apply_overrides(read_toml(ROOT / "recipes/tiny_smoke.toml"), settings), "layouts")


def whole_weights(run: Run) -> dict[str, Tensor]:
    """Every parameter and buffer of the model, whole, by name; complete on rank 0."""
    whole = {}
    for name, tensor in run.model.state_dict().items():
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        whole[name] = gathered.detach().clone()
    every: dict[str, Tensor] = {}
    for part in run.ranks.gather(whole):  # stages of a pipeline hold different names
        every = {**part, **every}
    return every


def awkward_rows(step: int, tokens: int, vocabulary: int, ratios: tuple[int, ...]) -> list[Batch]:
    """The step's rows of all ranks, the same wherever they are made."""
    generator = torch.Generator().manual_seed(1000 + step)

    def lengths(total: int) -> list[int]:
        parts: list[int] = []
        while (left := total - sum(parts)) > 0:
            longest = left if torch.rand((), generator=generator) < 0.3 else max(left // 3, 1)
            parts.append(int(torch.randint(1, longest + 1, (), generator=generator)))
        return parts

    packed = [[tokens], lengths(tokens), [1, 2, tokens // 2, *lengths(tokens // 4)], [2]]
    rows = []
    for documents in packed:
        used = sum(documents)
        ids = torch.zeros(tokens, dtype=torch.int64)
        ids[:used] = torch.randint(0, vocabulary, (used,), generator=generator)
        mask = torch.zeros(tokens)
        mask[:used] = (torch.rand(used, generator=generator) < 0.7).float()
        rows.append(Batch(ids, mask, PackedLayout.build(documents, ratios, tokens)))
    assert len(rows) == ROWS
    return rows
