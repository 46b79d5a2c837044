"""The exact state of a run: what must come back bit for bit so that the next step is the one that followed.

Tensors: fp32 master parameters and buffers (router biases, hash tables), the moments and counters of both
optimisers, every rank's random generators, and how many tokens each expert and each row of the embedding got
(`evidence/coverage.py`). Position: steps and tokens done, place in the data, skipped steps in a
row. The learning rate is a function of step and configuration, and both are in the manifest; so are the settings
of the optimisers, which a resumed run takes from its configuration and not from the checkpoint.

A parameter that no step has reached has no optimiser state, and has none after a restore either.

On another number of ranks: parameters and moments are cut anew, the place in the data is global, and rank r has
the generator that rank r had. Ranks that were not there take a seed made of the run's seed, the step and their
number; generators of ranks that are gone are carried along, so that going back gives back the very state. Training
itself draws no random numbers today.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import Generation
from fullweight.checkpoint.peers import Peers
from fullweight.core.errors import CheckpointError
from fullweight.data.loader import PackedLoader
from fullweight.devices import of
from fullweight.evidence.coverage import COUNTED_FROM, ROUTED, SEEN
from fullweight.optim.groups import kind
from fullweight.optim.offload import moment_like
from fullweight.parallel.mesh import Ranks
from fullweight.train.guards import Guard

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # as get_model_state_dict leaves them out


@dataclass
class TrainState:
    """What changes from step to step. `step` is the number of steps done."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loader: PackedLoader
    ranks: Ranks
    guard: Guard
    seed: int
    step: int = 0
    tokens: int = 0  # real tokens trained on so far, all ranks
    routed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))  # [MoE layers, experts]
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [vocabulary]
    counted_from: int = 0  # the step after which `routed` and `seen` count, on all ranks
    _spare_generators: dict[str, Tensor] = field(default_factory=dict)

    def count(self, routed: Tensor, seen: Tensor) -> None:
        """Take in the tokens, of all ranks, of a step that was applied."""
        self.routed = self.routed + routed if self.routed.numel() else routed
        self.seen = self.seen + seen if self.seen.numel() else seen

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name in order, not copied; sharded ones as DTensors."""
        state = _weights(self.model)
        for prefix, optimizer, parameter in self._optimised():
            for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
                state[f"{prefix}.{key}"] = value
        for device, generator in _generators(self.ranks.device).items():
            state[f"random.rank_{self.ranks.rank}.{device}"] = generator
        if self.seen.numel():
            state |= {ROUTED: self.routed, SEEN: self.seen}
        return dict(sorted((state | self._spare_generators).items()))

    def position(self) -> dict[str, Any]:
        """Everything else, equal on all ranks, for JSON."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "data": self.loader.state_dict(),
            "skips_in_a_row": self.guard.skips_in_a_row,
            COUNTED_FROM: self.counted_from,
        }

    def restore(self, generation: Generation) -> None:
        """Become the state of a verified generation; all ranks together.

        Raises CheckpointError or DataError, before anything is changed, when it is not a state of this run.
        """
        position, stored = generation.manifest.facts.position, store.contents(generation)
        self.loader.load_state_dict(position["data"])
        moments = self._room_for_moments(generation, stored)
        generators = self._room_for_generators(stored)
        weights = _weights(self.model)
        values = weights | {name: tensor for entry in moments.values() for name, tensor in entry.items()}
        counts = {n: torch.empty(stored[n].shape, dtype=torch.int64) for n in (ROUTED, SEEN) if n in stored}
        everything = values | generators | counts
        store.load(generation, everything, complete=("model", "optimizer", "coverage"), peers=Peers())
        set_model_state_dict(self.model, {n.removeprefix("model."): values[n] for n in weights})
        for prefix, optimizer, parameter in self._optimised():
            optimizer.state.pop(parameter, None)
            if prefix in moments:
                entry = moments[prefix].items()
                optimizer.state[parameter] = {name.rpartition(".")[2]: tensor for name, tensor in entry}
        self._restore_generators(generators, position["step"])
        self.step, self.tokens = position["step"], position["tokens"]
        self.guard.skips_in_a_row = position["skips_in_a_row"]
        empty = torch.zeros(0, dtype=torch.int64)
        self.routed, self.seen = counts.get(ROUTED, empty), counts.get(SEEN, empty)
        self.counted_from = position.get(COUNTED_FROM, self.step)  # earlier states hold no counts

    def _optimised(self) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
        """(prefix of the names of its state, optimiser, parameter)."""
        names = {parameter: _plain(name) for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield f"optimizer.{kind(optimizer)}.{names[parameter]}", optimizer, parameter

    def _room_for_moments(
        self, generation: Generation, stored: dict[str, store.Stored]
    ) -> dict[str, dict[str, Tensor]]:
        """Empty tensors for the optimiser state that is stored, by prefix and full name, sharded as it will be."""
        by_prefix: dict[str, list[str]] = {}
        for name in stored:
            if name.startswith("optimizer."):
                by_prefix.setdefault(name.rpartition(".")[0], []).append(name)
        room: dict[str, dict[str, Tensor]] = {}
        for prefix, optimizer, parameter in self._optimised():
            names = by_prefix.pop(prefix, [])
            if names:
                room[prefix] = {name: _empty(stored[name], parameter, optimizer) for name in names}
        # stages of a pipeline train different parameters
        everywhere = {prefix for prefixes in self.ranks.gather(list(room)) for prefix in prefixes}
        unknown = [prefix for prefix in by_prefix if prefix not in everywhere]
        if unknown:
            found, left = unknown[0], len(unknown) - 1
            more = f" and {left} more" if left else ""
            raise CheckpointError(
                f"{generation.path} holds {found}{more}, and this run trains no such parameter with that "
                "optimiser; resume with the model, what of it trains and the optimizer.name that wrote it"
            )
        return room

    def _room_for_generators(self, stored: dict[str, store.Stored]) -> dict[str, Tensor]:
        own = f"random.rank_{self.ranks.rank}."
        devices = _generators(self.ranks.device)
        names = [n for n in stored if n.startswith(own) and n.removeprefix(own) in devices]
        names += [n for n in stored if n.startswith("random.") and _rank_of(n) >= self.ranks.size]
        return {name: torch.empty(stored[name].shape, dtype=stored[name].dtype) for name in names}

    def _restore_generators(self, values: dict[str, Tensor], step: int) -> None:
        own = f"random.rank_{self.ranks.rank}."
        for device in _generators(self.ranks.device):
            if own + device in values:
                of(torch.device(device)).set_rng_state(values[own + device])
            else:
                torch.manual_seed(_seed(self.seed, step, self.ranks.rank))
        self._spare_generators = {n: t for n, t in values.items() if _rank_of(n) >= self.ranks.size}


def load_weights(model: nn.Module, generation: Generation) -> None:
    """Read only the model's tensors of a verified generation, in one process. Raises CheckpointError."""
    values = _weights(model)
    store.load(generation, values)
    set_model_state_dict(model, {name.removeprefix("model."): tensor for name, tensor in values.items()})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the model's own tensors and not copies."""
    return {f"model.{n}": t for n, t in get_model_state_dict(model).items() if isinstance(t, Tensor)}


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _empty(stored: store.Stored, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Room for one value of a parameter's optimiser state: shaped and sharded like it, or a counter."""
    if stored.shape == tuple(parameter.shape) and stored.shape:
        return moment_like(optimizer, parameter, stored.dtype)
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    return torch.empty(stored.shape, dtype=stored.dtype, device=parameter.device if on_device else "cpu")


def _rank_of(name: str) -> int:
    return int(name.split(".")[1].removeprefix("rank_"))


def _seed(*parts: int) -> int:
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that this rank draws from, the host's and its device's, by device type."""
    return {kind.type: kind.rng_state() for kind in (of(torch.device("cpu")), of(device))}
