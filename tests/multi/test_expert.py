"""Experts dealt over ranks give what one process gives, whatever the router does.

Three ranks, each with its own tokens and two of six experts. One process runs all tokens against all experts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.processes import fullweight
from torch import Tensor

from fullweight.ops import resolve_operations
from fullweight.parallel.expert import ExpertExchange

RANKS, EXPERTS, TOP_K, WIDTH, HIDDEN, LIMIT = 3, 6, 2, 32, 16, 10.0
TOKENS = (5, 40, 7)  # of each rank
OPERATIONS = ("reference", "cpu")
ROUTINGS = {
    "even": lambda t: torch.stack((torch.arange(t) % EXPERTS, (torch.arange(t) + 3) % EXPERTS), 1),
    # the last two ranks get no row, forward or backward
    "first rank alone": lambda t: torch.tensor([[1, 0]]).expand(t, 2),
    # beyond a capacity: choices of no expert, all of a token's among them, all of the first rank's
    "some dropped": lambda t: (
        torch.stack((torch.arange(t) % (EXPERTS + 1), torch.full((t,), EXPERTS)), 1)
        if t > TOKENS[0]
        else torch.full((t, 2), EXPERTS)
    ),
    "middle rank not": lambda t: torch.stack((torch.zeros(t, dtype=torch.int64), 4 + torch.arange(t) % 2), 1),
}


def parts(rank: int) -> dict[str, Tensor]:
    """A rank's tokens, weights and what its output's gradient is."""
    generator = torch.Generator().manual_seed(rank)
    tokens = TOKENS[rank]
    return {
        "x": torch.randn(tokens, WIDTH, generator=generator),
        "weights": torch.rand(tokens, TOP_K, generator=generator),
        "grad": torch.randn(tokens, WIDTH, generator=generator),
    }


def experts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    return (
        torch.randn(EXPERTS, 2 * HIDDEN, WIDTH, generator=generator) * 0.3,
        torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator) * 0.3,
    )


def main(arguments: list[str]) -> int:
    """Body of each rank: every routing with every set of operations."""
    dist.init_process_group("gloo")
    rank, exchange = dist.get_rank(), ExpertExchange(dist.group.WORLD)
    found = {}
    for name in OPERATIONS:
        ops = resolve_operations(name)

        def compute(rows: Tensor, chosen: Tensor, scale: Tensor, *own: Tensor, ops=ops) -> Tensor:  # type: ignore[no-untyped-def]
            return ops.experts(rows, chosen, scale, *own, LIMIT)

        for routing, choose in ROUTINGS.items():
            given = {key: value.requires_grad_(key != "grad") for key, value in parts(rank).items()}
            own = [part.chunk(RANKS)[rank].clone().requires_grad_() for part in experts()]
            chosen = choose(TOKENS[rank])
            out = exchange(given["x"], chosen, given["weights"], *own, compute)
            out.backward(given["grad"])
            gradients = {"x": given["x"].grad, "weights": given["weights"].grad}
            gradients |= {"gate_up": own[0].grad, "down": own[1].grad}
            found[name, routing] = {"out": out.detach(), **gradients}
    torch.save(found, Path(arguments[0]) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort at the interpreter's teardown


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("expert")
    ended = fullweight(folder, ranks=RANKS, call=f"{main.__module__}:main")
    assert ended.ok, ended.output
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("operations", OPERATIONS)
def test_dealt_experts_are_the_whole_ones(
    operations: str, routing: str, found: list[dict[tuple[str, str], dict[str, Tensor]]]
) -> None:
    """Output and all gradients, against float64 on all tokens at once; also where ranks get no row."""
    every = [parts(rank) for rank in range(RANKS)]
    x, weights, grad = (torch.cat([part[k] for part in every]).double() for k in ("x", "weights", "grad"))
    chosen = torch.cat([ROUTINGS[routing](tokens) for tokens in TOKENS])
    gate_up, down = (part.double().requires_grad_() for part in experts())
    x.requires_grad_()
    weights.requires_grad_()
    none = chosen == EXPERTS
    chosen = chosen.masked_fill(none, 0)
    rows = torch.einsum("tkhd,td->tkh", gate_up[chosen], x)
    gate, up = rows.chunk(2, -1)
    hidden = torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)
    out = torch.einsum("tkdh,tkh,tk->td", down[chosen], hidden, weights.masked_fill(none, 0))
    out.backward(grad)
    expected = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    ranks = [result[operations, routing] for result in found]
    for key, value in expected.items():
        torch.testing.assert_close(torch.cat([r[key] for r in ranks]).double(), value, rtol=1e-5, atol=1e-5)
    for key, parameter in (("gate_up", gate_up), ("down", down)):
        together = torch.cat([r[key] for r in ranks]).double()
        torch.testing.assert_close(together, parameter.grad, rtol=1e-5, atol=1e-5)
