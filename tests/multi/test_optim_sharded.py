"""Optimisers on parameters sharded over two processes give what one process gives.

Run by pytest, this file starts two gloo ranks of itself; each rank runs `main` and rank 0 writes what the
tests compare with a single process. Shapes are uneven on purpose: rows that do not divide, one-row matrices
(the second rank holds none of them), stacks cut inside a matrix and between two.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fullweight.core.errors import TrainingError
from fullweight.core.role import ParameterRole
from fullweight.optim import muon
from fullweight.optim.clip import clip_grad_norm
from fullweight.optim.groups import OptimizerConfig, build_optimizers

NUM_STEPS = 5
SHAPES: dict[str, tuple[tuple[int, ...], ParameterRole]] = {
    "odd": ((7, 12), ParameterRole("muon")),
    "tall": ((33, 5), ParameterRole("muon")),
    "square": ((16, 16), ParameterRole("muon")),
    "row": ((1, 9), ParameterRole("muon")),
    "column": ((6, 1), ParameterRole("muon")),
    "experts": ((5, 6, 10), ParameterRole("muon", num_matrices=5)),
    "gate_up": ((5, 8, 10), ParameterRole("muon", num_matrices=10)),
    "one_expert": ((1, 8, 10), ParameterRole("muon", num_matrices=2)),
    "groups": ((18, 7), ParameterRole("muon", num_matrices=3)),
    "two_per_slice": ((3, 4, 6), ParameterRole("muon", num_matrices=6)),
    "undecayed": ((6, 10), ParameterRole("muon", weight_decay=False)),
    "embedding": ((13, 4), ParameterRole("adamw")),
    "norm": ((5,), ParameterRole("adamw", weight_decay=False)),
    "scale": ((1,), ParameterRole("adamw", weight_decay=False)),
}


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (shape, _) in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, targets: dict[str, Tensor]) -> Tensor:
        losses = [(self.get_parameter(n) * t).sum() for n, t in targets.items()]
        return torch.stack(losses).sum()


def targets_of(step: int) -> dict[str, Tensor]:
    """The gradient of each parameter at this step; one expert is reached by no token."""
    generator = torch.Generator().manual_seed(100 + step)
    targets = {n: torch.randn(shape, generator=generator) for n, (shape, _) in SHAPES.items()}
    targets["experts"][2] = 0.0
    return targets


def build(name: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The module, sharded when ranks exist, and its optimisers."""
    model: nn.Module = Ragged()
    if dist.is_initialized():
        fully_shard(model)
    values = {"name": name, "learning_rate": 0.05, "muon": {"ns_dtype": "float32"}}
    roles = {n: role for n, (_, role) in SHAPES.items()}
    return model, build_optimizers(model, roles, OptimizerConfig.resolve(values))


def advance(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> list[Tensor]:
    """Take steps on the mean loss over ranks; the clipped gradient norms."""
    norms = []
    for step in steps:
        model(targets_of(step)).backward()
        norms.append(clip_grad_norm(model.parameters(), 10.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return norms


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: full(p) for n, p in model.named_parameters()}


def straight_run() -> dict[str, object]:
    model, optimizers = build("muon")
    norms = advance(model, optimizers, range(NUM_STEPS))
    momentum = {
        n: full(optimizers[0].state[p]["momentum"])
        for n, p in model.named_parameters()
        if p in optimizers[0].state
    }
    return {"weights": weights_of(model), "norms": norms, "momentum": momentum}


def one_matrix_at_a_time() -> dict[str, object]:
    muon.CHUNK_ENTRIES = 1
    result = straight_run()
    muon.CHUNK_ENTRIES = 1 << 23
    return result


def resumed_run() -> dict[str, object]:
    """Two steps, state through torch.distributed.checkpoint's helpers into fresh objects, three more."""
    model, optimizers = build("muon")
    advance(model, optimizers, range(2))
    model_state, optimizer_state = get_state_dict(model, optimizers)
    fresh, fresh_optimizers = build("muon")
    # What a checkpoint reader does first: the new optimiser's own state, created by a step of rate zero.
    before = weights_of(fresh)
    template = get_optimizer_state_dict(fresh, fresh_optimizers)
    untouched = all(torch.equal(before[n], w) for n, w in weights_of(fresh).items())
    same_keys = template["state"].keys() == optimizer_state["state"].keys()
    fresh.load_state_dict(model_state)
    set_optimizer_state_dict(fresh, fresh_optimizers, optimizer_state)
    norms = advance(fresh, fresh_optimizers, range(2, NUM_STEPS))
    return {"weights": weights_of(fresh), "norms": norms, "intact": untouched and same_keys}


def gathered_state() -> dict[str, object]:
    """The state as whole tensors, which one process must be able to load."""
    model, optimizers = build("muon")
    advance(model, optimizers, range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizers, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def norms_with_a_nan() -> dict[str, object]:
    """One rank alone holds the NaN; both must see it and neither scale."""
    model, _ = build("muon")
    targets = targets_of(0)
    targets["embedding"][12, 3] = float("nan")
    model(targets).backward()
    before = full(model.get_parameter("odd").grad)
    norm = clip_grad_norm(model.parameters(), 1e-3)
    return {"norm": norm, "unchanged": torch.equal(before, full(model.get_parameter("odd").grad))}


def refusal_of_other_dimension() -> dict[str, object]:
    model = Ragged()
    from torch.distributed.tensor import Shard

    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.shape == (5, 8, 10) else Shard(0))
    try:
        build_optimizers(model, {n: r for n, (_, r) in SHAPES.items()}, OptimizerConfig(learning_rate=0.1))
    except TrainingError as error:
        return {"message": str(error)}
    return {"message": ""}


CASES: tuple[Callable[[], dict[str, object]], ...] = (
    straight_run,
    one_matrix_at_a_time,
    resumed_run,
    gathered_state,
    norms_with_a_nan,
    refusal_of_other_dimension,
)


def main(folder: str) -> None:
    """Body of each rank."""
    dist.init_process_group("gloo")
    results = {case.__name__: case() for case in CASES}
    torch.save(results, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(2)]


def assert_same_run(found: dict, expected: dict) -> None:
    # fp32 sums in another order (batch sizes differ), through ten Newton-Schulz steps and NUM_STEPS updates.
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-6, msg=name)
    for a, b in zip(found["norms"], expected["norms"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_two_ranks_equal_one(ranks: list[dict]) -> None:
    """Weights, momentum and gradient norms after five steps, whole matrices and cut ones."""
    expected = straight_run()
    assert_same_run(ranks[0]["straight_run"], expected)
    for name, momentum in expected["momentum"].items():
        torch.testing.assert_close(ranks[0]["straight_run"]["momentum"][name], momentum, rtol=1e-6, atol=1e-6)


def test_rounds_of_one_matrix_equal_one_round(ranks: list[dict]) -> None:
    """The bound on temporaries changes the schedule, not the result."""
    assert_same_run(ranks[0]["one_matrix_at_a_time"], ranks[0]["straight_run"])


def test_ranks_agree_bit_for_bit(ranks: list[dict]) -> None:
    """Every rank returns the same gradient norm and the same gathered weights."""
    first, second = (r["straight_run"] for r in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first["norms"], second["norms"], strict=True))
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in SHAPES)


def test_resume_on_two_ranks_is_exact(ranks: list[dict]) -> None:
    """Through get_state_dict and set_optimizer_state_dict: the same bits as a run without a break."""
    resumed, straight = ranks[0]["resumed_run"], ranks[0]["straight_run"]
    assert resumed["intact"]
    assert all(torch.equal(resumed["weights"][n], straight["weights"][n]) for n in SHAPES)


def test_one_process_resumes_what_two_saved(ranks: list[dict]) -> None:
    """Gathered state loads into one process, which then follows the straight run."""
    model, optimizers = build("muon")
    model.load_state_dict(ranks[0]["gathered_state"]["model"])
    set_optimizer_state_dict(model, optimizers, ranks[0]["gathered_state"]["optimizer"])
    norms = advance(model, optimizers, range(2, NUM_STEPS))
    straight = ranks[0]["straight_run"]
    assert_same_run({"weights": weights_of(model), "norms": norms}, straight | {"norms": straight["norms"][2:]})


def test_nan_on_one_rank_is_seen_by_both(ranks: list[dict]) -> None:
    """And nothing is scaled."""
    for rank in ranks:
        assert rank["norms_with_a_nan"]["norm"].isnan()
        assert rank["norms_with_a_nan"]["unchanged"]


def test_other_sharding_is_refused_by_name(ranks: list[dict]) -> None:
    """Muon takes shards along the first and last dimension; the message names the parameter."""
    assert "gate_up is placed" in ranks[0]["refusal_of_other_dimension"]["message"]


if __name__ == "__main__":
    main(sys.argv[1])
