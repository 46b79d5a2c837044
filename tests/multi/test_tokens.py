"""A row whose tokens (and heads) are shared by ranks gives what one rank gives.

One launch of four ranks runs every cut of every pack; rank 0 of each row writes the sums over its ranks, which
are compared with a forward and backward pass of the whole row in this process. No optimiser, no FSDP: what is
compared is the mathematics of the cut alone - losses, expert counts, and the gradient of every parameter as the
plain sum over the ranks of a row.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.processes import fullweight
from tests.unit.models.cases import draw_documents, make_batch, randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fullweight.core.types import Batch
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.models.deepseek_v4.sharding import cut_of
from fullweight.parallel.context import SlicedTokens

RANKS = 4
CUTS = {"context4": (4, 1), "tensor4": (1, 4), "context2-tensor2": (2, 2)}
# Four slices of 192 tokens: longer than the window and than HCA's 128, and no multiple of it.
TOKENS = 768
PACKS = {
    "ragged": (1, 3, 4, 5, 127, 128, 129, 300),
    "one": (TOKENS,),
    "fifty": tuple(1 + (7 * i) % 29 for i in range(50)),
    "padded": (300, 20),  # the last two of four slices are padding alone
}


@dataclass(frozen=True)
class Variant:
    """How a pack is run."""

    ops: str = "cpu"
    dtype: torch.dtype = torch.float32
    indexer_loss: str = "selected"
    dense_csa: bool = False


VARIANTS = {
    "cpu": Variant(),
    "reference": Variant("reference"),
    "warmup": Variant(indexer_loss="visible", dense_csa=True),
    "bf16": Variant(dtype=torch.bfloat16),
}
# The faster operations on every pack; the other variants on the pack that has all lengths.
RUNS = [("tensor4", "ragged", "cpu")]
RUNS += [(cut, pack, "cpu") for cut in ("context4", "context2-tensor2") for pack in PACKS]
RUNS += [
    (cut, "ragged", variant)
    for cut in ("context4", "context2-tensor2")
    for variant in VARIANTS
    if variant != "cpu"
]


def architecture() -> DeepSeekV4Config:
    """Every kind of layer, hashed and scored experts, and MTP; heads and groups for up to four tensor ranks."""
    return DeepSeekV4Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=4,
        o_lora_rank=8,
        sliding_window=16,
        compress_ratios=(0, 4, 128, 4, 0),
        index_n_heads=32,
        index_head_dim=16,
        index_topk=5,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_hash_layers=1,
        routed_scaling_factor=1.5,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )


def build(variant: Variant) -> DeepSeekV4:
    model = DeepSeekV4(architecture(), variant.dtype, ops=variant.ops, indexer_loss=variant.indexer_loss)
    randomise(model, 7)
    model.dense_csa = variant.dense_csa
    return model


@functools.cache
def documents(pack: str) -> list[list[int]]:
    return draw_documents(build(Variant("reference")), PACKS[pack], seed=11)


def weighted(losses: dict[str, Tensor]) -> Tensor:
    """Every component at a weight of its own, so that none hides behind another."""
    weights = {"lm": 1.0, "mtp": 0.5, "indexer": 0.25, "balance": 2.0}
    return torch.stack([weights[name] * value for name, value in losses.items()]).sum() / TOKENS


def run(model: DeepSeekV4, batch: Batch) -> dict[str, object]:
    output = model(batch)
    weighted(output.losses).backward()
    return {
        "losses": {name: value.detach().double() for name, value in output.losses.items()},
        "log_probs": output.log_probs,
        "expert_counts": output.expert_counts,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


# ---- on the ranks -----------------------------------------------------------------------------------


def cut_heads(model: DeepSeekV4, mesh: object) -> None:
    """Replace what is divided by heads by this rank's part."""
    for name, parameter in list(model.named_parameters()):
        found = cut_of(name)
        if found is not None and found.axis == "tensor":
            owner, _, attribute = name.rpartition(".")
            placements = [Shard(found.dim)]
            part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)  # type: ignore[arg-type]
            setattr(model.get_submodule(owner), attribute, nn.Parameter(part))


def on_ranks(folder: Path) -> None:
    packs = torch.load(folder / "packs.pt")
    for cut, (context, tensor) in CUTS.items():
        mesh = init_device_mesh(
            "cpu", (RANKS // context // tensor, context, tensor), mesh_dim_names=("r", "c", "t")
        )
        slices = mesh["c", "t"]._flatten("slices").get_group()
        groups = [mesh.get_group(axis) if size > 1 else None for axis, size in (("c", context), ("t", tensor))]
        axis = SlicedTokens(slices, *groups)
        for _, pack, name in (r for r in RUNS if r[0] == cut):
            model = build(VARIANTS[name])
            model.axis = axis
            if tensor > 1:
                cut_heads(model, mesh["t"])
            found = run(model, make_batch(packs[pack], model.config, TOKENS))
            total = summed(found, slices, mesh.get_group("c"))
            if dist.get_rank() == 0:
                torch.save(total, folder / f"{cut}-{pack}-{name}.pt")


def summed(found: dict[str, object], slices: dist.ProcessGroup, context: dist.ProcessGroup) -> dict[str, object]:
    """The plain sums over the ranks of a row; parts of a parameter over those that hold the same part."""
    result: dict[str, object] = {"losses": found["losses"], "gradients": {}}
    for value in found["losses"].values():  # type: ignore[attr-defined]
        dist.all_reduce(value, group=slices)
    dist.all_reduce(found["expert_counts"], group=slices)
    result["expert_counts"] = found["expert_counts"]
    parts = [torch.empty_like(found["log_probs"]) for _ in range(dist.get_world_size(slices))]
    dist.all_gather(parts, found["log_probs"], group=slices)
    result["log_probs"] = torch.cat(parts)
    for name, gradient in found["gradients"].items():  # type: ignore[attr-defined]
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(local, group=context if isinstance(gradient, DTensor) else slices)
        result["gradients"][name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return result


def main(arguments: list[str]) -> int:
    """Body of each rank."""
    dist.init_process_group("gloo")
    on_ranks(Path(arguments[0]))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's teardown


# ---- here -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    torch.save({pack: documents(pack) for pack in PACKS}, folder / "packs.pt")
    ended = fullweight(folder, ranks=RANKS, call="tests.multi.test_tokens:main")
    assert ended.ok, ended.output
    return folder


@functools.cache
def alone(pack: str, variant: str) -> dict[str, object]:
    model = build(VARIANTS[variant])
    return run(model, make_batch(documents(pack), model.config, TOKENS))


@pytest.mark.parametrize(("cut", "pack", "variant"), RUNS)
def test_slices_add_up_to_the_row(cut: str, pack: str, variant: str, folder: Path) -> None:
    found, expected = torch.load(folder / f"{cut}-{pack}-{variant}.pt"), alone(pack, variant)
    errors, norms = differences(found, expected), differences(None, expected)
    whole = math.hypot(*norms.values())
    bound = 2e-6  # fp32 sums of some hundred terms in another order: about 1e-7 of the loss
    if VARIANTS[variant].dtype == torch.bfloat16:
        # Rounding decides some choices of experts and entries, and other rounding decides them otherwise: what can
        # be asked is that a cut row is as near to fp32 as a whole one.
        expected, bound = alone(pack, "cpu"), 1e-2
        rounding = math.hypot(*differences(alone(pack, variant), expected).values())
        assert math.hypot(*differences(found, expected).values()) <= 1.5 * rounding
    else:
        assert torch.equal(found["expert_counts"], expected["expert_counts"])
        torch.testing.assert_close(found["log_probs"], expected["log_probs"], rtol=0, atol=2e-5)
        for name, error in errors.items():
            # An index product that is zero to rounding has a gradient or none: relu's kink. And what is left where
            # large terms cancel (a few scales and biases) carries the rounding of those.
            relative = 1e-3 if ".indexer." in name else 2e-5
            assert error <= relative * norms[name] + 1e-7 * whole, name
    for name, value in expected["losses"].items():  # type: ignore[attr-defined]
        assert found["losses"][name].item() == pytest.approx(value.item(), rel=bound), name


def differences(found: dict[str, object] | None, expected: dict[str, object]) -> dict[str, float]:
    """Norm of the difference of each parameter's gradient; the norm alone without `found`."""
    gradients = {n: g for n, g in expected["gradients"].items() if g is not None}  # type: ignore[attr-defined]
    if found is not None:
        present = {n: g for n, g in found["gradients"].items() if g is not None}  # type: ignore[attr-defined]
        assert present.keys() == gradients.keys()
        gradients = {n: present[n] - g for n, g in gradients.items()}
    return {n: torch.linalg.vector_norm(g).item() for n, g in gradients.items()}
