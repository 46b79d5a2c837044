"""Watches a process's torch operations: memory, collectives and FLOPs, for real and for fake tensors alike.

A dispatch mode sees every operation below autograd. New storages are noted at birth and, by weak reference, at
death; FSDP resizes storages behind the dispatcher's back, so `UntypedStorage.resize_` is watched too. What DTensor
runs on shapes of whole tensors, to learn those of its results, takes no memory and is not watched. Collectives
are written down with group, kind, bytes and the module that was running. FLOPs are torch's own formulas for matrix
products. A module is known from forward hooks; in backward from the autograd nodes of its outputs.

The stock tools do not serve: MemTracker refuses modules that run once per micro-batch, CommDebugMode trips on the
same. Left out: time, and what a kernel takes for itself.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from fullweight.core import phase
from fullweight.ops.late import forming
from fullweight.rehearse.memory import Block, Category, Timeline, timeline

_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_to_all_single": "all_to_all",
}
BETWEEN_STAGES = ("send", "recv")
# Of the arguments of an in-place collective, which holds what this rank gives.
_GIVEN = {"_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1, "reduce_scatter_": 1}
_GIVEN |= {"alltoall_base_": 1, "alltoall_": 1}


Pass = tuple[str, str]
"""Phase of the step and its detail: which pass of which micro-batch was under way."""


@dataclass(frozen=True)
class Exchange:
    """One kind of collective of one module: `group` names the mesh axis; `num_bytes` is what this rank gave."""

    group: str
    kind: str
    num_bytes: int
    module: str
    in_backward: bool


class Tracer(TorchDispatchMode):
    """Record of all that happens inside `with tracer:`; marks say what persistent tensors are."""

    def __init__(self, group_names: dict[str, str] | None = None) -> None:
        super().__init__()
        self.group_names = group_names or {}
        self.blocks: list[Block] = []
        # each with the phase and its detail, which names the micro-batch
        self.exchanges: Counter[tuple[Exchange, Pass]] = Counter()
        self.flops: Counter[tuple[str, Pass]] = Counter()  # of an operation
        self.module = ""
        self.moment = 0
        self._live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._backward_begins: list[int] = []
        self._in_backward = False
        self._modules: list[tuple[int, str]] = [(0, "")]
        self._parameters: list[Tensor] = []

    # ---- what the record says -----------------------------------------------------------------------

    def timeline(self) -> Timeline:
        return timeline(self.blocks, self._backward_begins, self.moment)

    def module_at(self, moment: int) -> str:
        """Which module ran at that moment, and in which pass."""
        found = ""
        for begin, name in self._modules:
            if begin > moment:
                break
            found = name
        return found

    # ---- marks --------------------------------------------------------------------------------------

    def bytes_of(self, what: Category) -> int:
        """Bytes that were marked so, at any time."""
        return sum(block.num_bytes for block in self.blocks if block.mark is what)

    def mark(self, tensors: Iterable[Tensor | None], what: Category) -> None:
        """Say what these tensors are for, from their birth on."""
        for tensor in tensors:
            for storage in storages(tensor) if tensor is not None else ():
                self._note(storage)
                self._live[storage].mark = what

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Say that these tensors are in the host's memory: no block is written down for them."""
        for tensor in tensors:
            for storage in storages(tensor):
                self._live[storage] = Block(storage.nbytes(), self.moment, self.module, self._in_backward)

    def mark_gradients(self, model: nn.Module) -> None:
        """Whatever is a parameter's gradient when an optimiser begins has been a gradient from its birth on."""
        self._parameters = list(model.parameters())

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know by name which of the model's modules runs."""
        names = {m: n for n, m in model.named_modules()}
        handles = []
        for module, name in names.items():
            if name:
                handles.append(module.register_forward_pre_hook(self._entering(name)))
                handles.append(module.register_forward_hook(self._leaving(name)))
        handles.append(register_optimizer_step_pre_hook(lambda *_: self._optimizing()))
        handles.append(register_optimizer_step_post_hook(lambda *_: self._enter("")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            self._enter(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            for leaf in tree_leaves(outputs):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.grad_fn.register_prehook(lambda _grads: self._enter(name))
            self._enter(name.rpartition(".")[0])

        return hook

    def _optimizing(self) -> None:
        self.mark((p.grad for p in self._parameters), Category.gradients)
        self._enter("optimizer")

    def _enter(self, name: str) -> None:
        self.module = name
        backward = torch._C._current_graph_task_id() != -1
        label = name if name == "optimizer" else f"{name or 'model'} ({'backward' if backward else 'forward'})"
        if self._modules[-1][0] == self.moment:
            self._modules[-1] = (self.moment, label)
        else:
            self._modules.append((self.moment, label))

    # ---- watching -----------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled; the wrapper that sees to that takes as long as a fake operation

    def __enter__(self) -> Tracer:
        original = torch.UntypedStorage.resize_
        self._original_resize = original

        @wraps(original)
        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        propagate = self._original_propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        @wraps(propagate)
        def unwatched(*arguments: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return propagate(*arguments, **options)

        ShardingPropagator._propagate_tensor_meta_non_cached = unwatched  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._original_propagate  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # most calls by far, of tensors without data, and no operation
            return func(*args) if not isinstance(args[0], FakeTensor) else args[0].fake_device
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come here one by one
        kwargs = kwargs or {}
        self.moment += 1
        self._note_pass()
        result = func(*args, **kwargs)
        name = getattr(func, "namespace", "")
        if name in ("c10d", "_c10d_functional"):
            self._collective(func, args, result)
        elif (count := flop_registry.get(getattr(func, "overloadpacket", func))) is not None:
            made = count(*args, **kwargs, out_val=result)
            self.flops[str(func.overloadpacket), _under_way()] += made
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    self._note(storage)
        return result

    def _note_pass(self) -> None:
        # hooks of a backward pass included, and products that it put off
        backward = torch._C._current_graph_task_id() != -1 or forming()
        if backward and not self._in_backward:
            self._backward_begins.append(self.moment)
        self._in_backward = backward

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._live:
            if self._live[storage].num_bytes != storage.nbytes():
                self._resized(storage)
            return
        self._born(storage)

    def _born(self, storage: torch.UntypedStorage, mark: Category | None = None) -> None:
        block = Block(storage.nbytes(), self.moment, self.module, self._in_backward, mark)
        self.blocks.append(block)
        self._live[storage] = block
        weakref.finalize(storage, self._died, block)

    def _died(self, block: Block) -> None:
        if block.death is None:
            block.death = self.moment + 1

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that sharding fills and empties: the weights gathered in it come and go."""
        block = self._live.get(storage)
        if block is not None:
            block.death = self.moment
            if block.mark is None:
                block.mark = Category.gathered
        self._born(storage, Category.gathered)

    def _collective(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        operation = func.overloadpacket.__name__
        if operation in ("wait_tensor", "monitored_barrier_"):
            return
        given = args[_GIVEN.get(operation, 0)] if args else None
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        size = sum(t.numel() * t.element_size() for t in tensors)
        group = next((self._group(a) for a in args if _names_a_group(a)), "")
        kind = _KINDS[operation]
        # between stages: whatever ran last is not what sends
        module, in_backward = ("", False) if kind in BETWEEN_STAGES else (self.module, self._in_backward)
        self.exchanges[Exchange(group, kind, size, module, in_backward), _under_way()] += 1
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, Tensor):
                for storage in storages(leaf):
                    self._note(storage)
                    self._live[storage].in_collective = True

    def _group(self, argument: Any) -> str:
        name = argument if isinstance(argument, str) else torch.distributed.ProcessGroup.unbox(argument).group_name
        return self.group_names.get(name, name)


def _under_way() -> Pass:
    place = phase.now()
    return place.phase, place.detail


def _names_a_group(argument: Any) -> bool:
    if isinstance(argument, str):
        return argument not in ("sum", "avg", "max", "min")
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages behind a tensor, a sharded one's local part included."""
    if isinstance(tensor, DTensor):
        return storages(tensor._local_tensor)
    try:
        return [tensor.untyped_storage()]
    except NotImplementedError:  # a tensor without storage, such as one of a functional wrapper
        return []
