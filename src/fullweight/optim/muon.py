"""Muon: momentum, orthogonalised matrix by matrix, for every matrix of the model.

For each independent matrix W [n, m] with gradient G (DeepSeek-V4 report, algorithm 1):
M <- mu M + G;  O = HNS(mu M + G) * sqrt(max(n, m)) * gamma;  W <- W (1 - eta lambda) - eta O.
HNS is ten Newton-Schulz steps from X = M / ||M||_F: eight that drive the singular values near 1 fast, two
that settle them there. They all end at about 1, so O has RMS gamma and AdamW's learning rate fits.

A parameter may stack many matrices (experts, groups); each is orthogonalised alone, and matrices of one shape are
batched, also across the parameters of a bucket (`buckets.py`), within a bound on temporaries. On sharded
parameters (DTensor) the momentum is sharded likewise; `pieces.py` says which rectangle of it lies on which rank. A
matrix that lies whole on one rank is updated there, as every expert is. One that is cut, by rows, columns or both,
gets one owner rank, by cost: its pieces travel there and the result travels back, in rounds of bounded size, two
all-to-all calls each.

A matrix without direction, all entries below `NO_SIGNAL` (an expert that no token has reached yet), gets a
zero update; weight decay still applies. Momentum keeps moving an expert whose gradient is zero only now.

Left out: QK-clip (the query and key norms make it unneeded).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from fullweight.core.config import Config
from fullweight.core.tensors import local_part
from fullweight.optim.buckets import buckets
from fullweight.optim.pieces import Piece, Pieces, pieces_of
from fullweight.optim.rounds import rounds

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
# Below this the smaller entries of an fp32 matrix are subnormal: its direction is rounding noise.
NO_SIGNAL = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
# Matrix entries orthogonalised at once: 32 MiB of fp32; one matrix that is larger goes alone.
CHUNK_ENTRIES = 1 << 23


class MuonConfig(Config):
    """Momentum, size of the update, and precision of the Newton-Schulz products."""

    momentum: float = Field(0.95, ge=0, lt=1)
    update_rms: float = Field(0.18, gt=0, description="gamma: RMS of the update per unit of learning rate")
    ns_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"


@torch.no_grad()
def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrix of each of `matrices` [k, n, m] (fp32), approximately, in `dtype`.

    Singular values end within 2 % of 1 when no singular value is below about 1e-4 of the norm; a matrix with
    all entries below `NO_SIGNAL` gives zeros. The input is not changed.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    # Scaled by the largest entry first: the squares of very small or large gradients leave fp32's range.
    peak = torch.linalg.vector_norm(wide, ord=torch.inf, dim=(-2, -1), keepdim=True)
    silent = peak <= NO_SIGNAL
    scaled = wide / peak.masked_fill(silent, 1.0)
    scaled /= torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True).masked_fill(silent, 1.0)
    # Contiguous: a batched bf16 product of transposed views is about 100 times slower on a CPU.
    x = scaled.masked_fill_(silent, 0.0).to(dtype).contiguous()
    del scaled
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    polynomial, following = torch.empty_like(gram), torch.empty_like(x)
    for a, b, c in COEFFICIENTS:
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, polynomial, x, beta=a, out=following)
        x, following = following, x
    return x if wide is matrices else x.mT


@dataclass(frozen=True)
class _Work:
    """This rank's part of some matrices of one parameter; a view, so that updates land in the weights."""

    weight: Tensor  # [k, n, m], or [rows, columns] of a cut matrix
    gradient: Tensor
    momentum: Tensor
    mu: float
    step_size: float  # eta * gamma * sqrt(max(n, m))

    def direction(self) -> Tensor:
        """mu M + G in fp32."""
        return torch.add(self.gradient, self.momentum, alpha=self.mu)

    def apply(self, orthogonal: Tensor) -> None:
        self.weight.add_(orthogonal, alpha=-self.step_size)

    def part(self, begin: int, end: int) -> _Work:
        return self._map(lambda x: x[begin:end])

    def as_matrices(self, rows: int) -> _Work:
        return self._map(lambda x: x.view(-1, rows, x.shape[-1]))

    def _map(self, view: Callable[[Tensor], Tensor]) -> _Work:
        return replace(self, weight=view(self.weight), gradient=view(self.gradient), momentum=view(self.momentum))


@dataclass(frozen=True)
class _CutMatrix:
    """A matrix that lies in pieces on several ranks of one process group."""

    shape: tuple[int, int]
    pieces: tuple[Piece, ...]  # of the matrix, on each rank in rank order; empty ones where a rank has none
    work: _Work  # this rank's piece


class Muon(torch.optim.Optimizer):
    """The optimiser; each param group sets "num_matrices" and "weight_decay", and may set the rest.

    A parameter p of a group is `p.view(num_matrices, -1, p.shape[-1])`: independent matrices of equal shape.
    State: "momentum", of the dtype of the parameter, shaped and sharded like it. `step` is collective for sharded
    parameters, so a parameter must have a gradient on all ranks or on none.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], config: MuonConfig, learning_rate: float) -> None:
        self.ns_dtype: torch.dtype = getattr(torch, config.ns_dtype)
        defaults = {
            "lr": learning_rate,
            "momentum": config.momentum,
            "update_rms": config.update_rms,
            "weight_decay": 0.0,
            "num_matrices": 1,
        }
        super().__init__(groups, defaults)
        # now, for it may have to create process groups
        self._layouts: dict[Tensor, Pieces] = {
            p: pieces_of(p, g["num_matrices"]) for g in self.param_groups for p in g["params"]
        }

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in buckets(self.param_groups):
            self._step(bucket)
        return loss

    def _step(self, bucket: list[tuple[dict[str, Any], Tensor]]) -> None:
        whole: list[_Work] = []
        cut: dict[dist.ProcessGroup, list[_CutMatrix]] = defaultdict(list)
        for group, parameter in bucket:
            if parameter.grad is not None:
                self._decay_and_accumulate(parameter, group, whole, cut)
        for shape_work in _by_shape(whole):
            for chunk in _chunks(shape_work):
                self._update(chunk)
        for process_group, matrices in cut.items():
            self._update_cut(process_group, matrices)

    def _decay_and_accumulate(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        whole: list[_Work],
        cut: dict[dist.ProcessGroup, list[_CutMatrix]],
    ) -> None:
        """The elementwise part; adds what has to be orthogonalised to `whole` and `cut`."""
        state, lr, mu = self.state[parameter], group["lr"], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        columns = parameter.shape[-1]
        layout = self._layouts[parameter]
        here = layout.pieces[layout.rank]
        weight, gradient, momentum = (
            local_part(x).view(here.shape) for x in (parameter, parameter.grad.contiguous(), state["momentum"])
        )
        momentum.mul_(mu).add_(gradient)
        weight.mul_(1.0 - lr * group["weight_decay"])
        if lr == 0:  # the end of some schedules, and how a checkpoint loader creates the state
            return
        rows = parameter.numel() // columns // group["num_matrices"]
        step_size = lr * group["update_rms"] * max(rows, columns) ** 0.5
        local = _Work(weight, gradient, momentum, mu, step_size)
        first, last = here.whole_matrices(rows, columns)
        if first < last:
            offset = here.rows[0]
            whole.append(local.part(first * rows - offset, last * rows - offset).as_matrices(rows))
        if layout.group is None:
            return
        for matrix in layout.cut:
            pieces = tuple(piece.within(matrix * rows, (matrix + 1) * rows) for piece in layout.pieces)
            start = max(matrix * rows - here.rows[0], 0)
            own = local.part(start, start + pieces[layout.rank].height)
            cut[layout.group].append(_CutMatrix((rows, columns), pieces, own))

    def _update(self, chunk: list[_Work]) -> None:
        counts = [len(work.weight) for work in chunk]
        directions = chunk[0].momentum.new_empty(sum(counts), *chunk[0].weight.shape[1:])
        for work, out in zip(chunk, directions.split(counts), strict=True):
            torch.add(work.gradient, work.momentum, alpha=work.mu, out=out)
        orthogonal = newton_schulz(directions, self.ns_dtype)
        for work, result in zip(chunk, orthogonal.split(counts), strict=True):
            work.apply(result)

    def _update_cut(self, process_group: dist.ProcessGroup, matrices: list[_CutMatrix]) -> None:
        for owned in _rounds(matrices, dist.get_world_size(process_group)):
            self._update_round(process_group, owned)

    def _update_round(self, process_group: dist.ProcessGroup, owned: list[list[_CutMatrix]]) -> None:
        """Orthogonalise `owned[r]` on rank r of the group: pieces to the owners, results back."""
        rank = dist.get_rank(process_group)
        matrices = [m for batch in owned for m in batch]
        mine = owned[rank]
        to_owner = [sum(m.work.weight.numel() for m in batch) for batch in owned]
        from_rank = [sum(m.pieces[r].size for m in mine) for r in range(len(owned))]
        sent = torch.cat([m.work.direction().flatten() for m in matrices])
        received = sent.new_empty(sum(from_rank))
        dist.all_to_all_single(received, sent, from_rank, to_owner, group=process_group)
        del sent
        # Pieces arrive by rank, then by matrix.
        arrived = iter(received.split([m.pieces[r].size for r in range(len(owned)) for m in mine]))
        gathered = [received.new_empty(m.shape) for m in mine]
        for r in range(len(owned)):
            for m, matrix in zip(mine, gathered, strict=True):
                m.pieces[r].of(matrix).copy_(next(arrived).view(m.pieces[r].shape))
        results: list[Tensor] = [torch.empty(0)] * len(mine)
        for indices in _same_shape(mine):
            stacked = torch.stack([gathered[i] for i in indices])
            for i, result in zip(indices, newton_schulz(stacked, self.ns_dtype), strict=True):
                results[i] = result
        del gathered
        back = [m.pieces[r].of(x).flatten() for r in range(len(owned)) for m, x in zip(mine, results, strict=True)]
        answer = torch.cat(back) if back else received.to(self.ns_dtype)
        returned = answer.new_empty(sum(to_owner))
        dist.all_to_all_single(returned, answer, to_owner, from_rank, group=process_group)
        counts = [m.work.weight.numel() for m in matrices]
        for m, result in zip(matrices, returned.split(counts), strict=True):
            m.work.apply(result.view_as(m.work.weight))


def _by_shape(works: list[_Work]) -> Iterator[list[_Work]]:
    shapes: dict[torch.Size, list[_Work]] = defaultdict(list)
    for work in works:
        shapes[work.weight.shape[1:]].append(work)
    yield from shapes.values()


def _chunks(works: list[_Work]) -> Iterator[list[_Work]]:
    """Consecutive matrices in chunks of at most CHUNK_ENTRIES entries, or of one larger matrix."""
    capacity = max(CHUNK_ENTRIES // works[0].weight[0].numel(), 1)
    chunk, room = [], capacity
    for work in works:
        begin = 0
        while begin < len(work.weight):
            end = min(begin + room, len(work.weight))
            chunk.append(work.part(begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield chunk
                chunk, room = [], capacity
    if chunk:
        yield chunk


def _same_shape(matrices: list[_CutMatrix]) -> list[list[int]]:
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        shapes[matrix.shape].append(index)
    return list(shapes.values())


def _rounds(matrices: list[_CutMatrix], num_ranks: int) -> Iterator[list[list[_CutMatrix]]]:
    return rounds(matrices, num_ranks, lambda m: m.shape, CHUNK_ENTRIES)
