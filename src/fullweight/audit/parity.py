"""Our model beside transformers' on one checkpoint: module by module, forward and backward, in fp32.

transformers reads the folder itself, so that the reading of the file is compared too, and runs each document in a
call of its own, eagerly and without a cache; ours runs all of them in one pack. FP8 and FP4 it cannot read on any
machine: such a checkpoint is given to it in FP32, which holds these values exactly, as we read them. The output of
every module and the loss's gradient with respect to it are compared in the order of the forward pass, gradients of
parameters by name. The first module beyond the bound is where to look: whatever comes behind it reads its error.

A choice of experts or entries that is nearly tied may go the other way by rounding alone, and then everything
behind it differs; draw other documents (`seed`) to tell. transformers has no MTP block and does not train the
indexer, so neither is compared here. Both models, their gradients and activations are in memory at once.

Some gradients are sums that all but cancel: in a young model, whose streams are nearly equal, that of the head's
mixing has 1e-7 of the whole, and in fp32 rounding decides its third digit on either side. No share of the whole
tells such rounding from a fault. So where modules agree and a parameter's gradient does not, both models are run
again in float64, where nothing of it is rounding. Wrong is what differs there too, or what is much further from
the float64 values than transformers' own fp32 is (the test that attention kernels are usually put to).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fullweight.checkpoint.export import FolderWeights, write_checkpoint
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.hf import load_model
from fullweight.core.errors import ConfigError
from fullweight.core.machine import require_memory
from fullweight.core.strict_json import parse_json
from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4.block import Sublayers
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.convert import transformers_name
from fullweight.models.deepseek_v4.model import DeepSeekV4

FORWARD_BOUND = 1e-4
"""Largest difference of a module's outputs over their largest value. fp32 rounding of a whole model of the parity
table (docs/parity.md) stays below 5e-5 at the logits; deeper models add up more."""

BACKWARD_BOUND = 5e-4
"""Norm of the difference of two gradients over the norm of transformers'."""

ROUNDINGS = 30
"""How many times transformers' own rounding ours may be, where that is what a gradient consists of. Rounding of
few numbers is small by luck now and then: the largest of a module's parameters counts, not the parameter's."""

_BYTES_PER_PARAMETER = 16  # two models in fp32 and their gradients
_BYTES_IN_FLOAT64 = 32  # a model, its gradients and the other's in float64, and both gradients in fp32


@dataclass(frozen=True)
class ModuleError:
    """A module's outputs, forward and as the loss's gradient with respect to them; infinite where not a number."""

    name: str
    forward: float
    backward: float | None  # None for the logits, which ours never holds in training


@dataclass(frozen=True)
class ParameterError:
    """The gradient of a parameter, under transformers' name.

    `in_float64` is None where both models were not run again in float64; `rounding` is how far transformers' own
    fp32 gradients are from their float64 values, the largest of the module's parameters.
    """

    name: str
    gradient: float
    in_float64: float | None = None
    rounding: float = 0.0

    @property
    def differs(self) -> bool:
        if self.gradient <= BACKWARD_BOUND:
            return False
        if self.in_float64 is None:
            return True
        return self.in_float64 > BACKWARD_BOUND or self.gradient > ROUNDINGS * self.rounding


@dataclass(frozen=True)
class Parity:
    """Errors in the order of the forward pass, and which of them are beyond their bound."""

    num_tokens: int
    modules: list[ModuleError]
    parameters: list[ParameterError]
    decoded: bool  # whether transformers was given the values of FP8 and FP4 as we read them
    loss: tuple[float, float]  # ours and transformers', summed over the predicted tokens

    @property
    def first_forward(self) -> str | None:
        """The first module whose outputs differ."""
        return next((m.name for m in self.modules if m.forward > FORWARD_BOUND), None)

    @property
    def first_backward(self) -> str | None:
        """The first module, from the loss back, whose gradient differs."""
        return next(
            (m.name for m in reversed(self.modules) if m.backward is not None and m.backward > BACKWARD_BOUND),
            None,
        )

    @property
    def bad_parameters(self) -> list[ParameterError]:
        return [p for p in self.parameters if p.differs]

    @property
    def mostly_rounding(self) -> list[ParameterError]:
        """Parameters beyond the bound in fp32 that agree in float64."""
        return [p for p in self.parameters if p.gradient > BACKWARD_BOUND and not p.differs]

    @property
    def holds(self) -> bool:
        return self.first_forward is None and self.first_backward is None and not self.bad_parameters


@dataclass
class _Seen:
    """Outputs of modules by name, a call of the module after the other; their gradients once there are any."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def keep(self, name: str, output: Tensor) -> None:
        output.retain_grad()
        self.outputs.setdefault(name, []).append(output)

    def values(self, name: str) -> Tensor:
        return torch.cat([_rows(x.detach()) for x in self.outputs[name]])

    def gradients(self, name: str) -> Tensor:
        return torch.cat([_rows(torch.zeros_like(x) if x.grad is None else x.grad) for x in self.outputs[name]])


def check_parity(folder: Path, lengths: Sequence[int], seed: int = 0, ops: str = "auto") -> Parity:
    """Compare on documents of random tokens of the given lengths.

    FP8 and FP4 are written out in FP32 meanwhile, in a temporary folder, for transformers. In float64 ours runs
    the reference operations, which define the others. Raises CheckpointError on a folder that cannot be read, or
    when the disk refuses; ConfigError without transformers or when memory does not suffice.
    """
    if not lengths or min(lengths) < 1 or max(lengths) < 2:
        raise ConfigError(f"documents of {list(lengths)} tokens predict nothing; give one of 2 or more")
    config = DeepSeekV4Config.from_file(folder)
    if max(lengths) > config.max_position_embeddings:
        raise ConfigError(
            f"a document of {max(lengths)} tokens is longer than the model's max_position_embeddings "
            f"({config.max_position_embeddings}); give shorter ones"
        )
    needed = _BYTES_PER_PARAMETER * config.num_parameters(mtp=True)
    require_memory(needed, f"{folder}: two models in float32 with gradients", "use a larger machine")
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    with _readable(folder) as plain:
        theirs, their_loss, their_gradients = _transformers(plain, documents)
        ours, our_loss, our_gradients = _ours(load_model(folder, ops=ops), documents)
        found = Parity(
            num_tokens=sum(lengths),
            modules=[_module_error(name, ours, theirs) for name in theirs.outputs],
            parameters=[
                ParameterError(name, error) for name, error in _errors(our_gradients, their_gradients).items()
            ],
            decoded=plain != folder,
            loss=(our_loss, their_loss),
        )
        del theirs, ours, our_gradients
        if found.first_forward is None and found.first_backward is None and found.bad_parameters:
            again = _in_float64(found.parameters, folder, plain, documents, their_gradients)
            found = replace(found, parameters=again)
    return found


def transformers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named as in our model under transformers' names; the MTP block is dropped."""
    renamed = {}
    for ours, tensor in tensors.items():
        for published, part in _published(ours, tensor):
            if (name := transformers_name(published)) is not None:
                renamed[name] = part
    return renamed


def _published(ours: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Published names of a tensor of ours: a stack of experts by its first one, the shared expert's parts."""
    stem, _, kind = ours.rpartition(".")
    first = "w2" if kind == "down" else "w1"
    if stem.endswith(".ffn.experts"):
        yield f"{stem}.0.{first}.weight", tensor
    elif stem.endswith(".shared_experts") and kind == "gate_up":
        gate, up = tensor.chunk(2)
        yield from ((f"{stem}.w1.weight", gate), (f"{stem}.w3.weight", up))
    elif stem.endswith(".shared_experts"):
        yield f"{stem}.{first}.weight", tensor
    else:
        yield ours, tensor


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The folder itself, or where it has matrices in FP8 or FP4, or says so, one of the same values in FP32."""
    said = parse_json((folder / "config.json").read_bytes()).get("quantization_config")
    with PublishedFolder(folder) as opened:
        if not said and not opened.catalogue.is_quantised:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="fullweight-parity-") as scratch:
            plain = Path(scratch) / "float32"
            write_checkpoint(FolderWeights(opened), opened.config, plain, "float32", origin=str(folder))
            yield plain


def _in_float64(
    found: Sequence[ParameterError],
    folder: Path,
    plain: Path,
    documents: list[list[int]],
    their_gradients: dict[str, Tensor],
) -> list[ParameterError]:
    """The same errors, beside those of both models in float64; `their_gradients` are transformers' in fp32."""
    needed = _BYTES_IN_FLOAT64 * DeepSeekV4Config.from_file(folder).num_parameters(mtp=True)
    require_memory(needed, f"{folder}: gradients that fp32 leaves open, in float64", "use a larger machine")
    exact = _transformers(plain, documents, torch.float64)[2]
    model = load_model(folder, compute_dtype=torch.float64, ops="reference").double()
    errors = _errors(_ours(model, documents)[2], exact)
    rounding: dict[str, float] = {}
    for name, gradient in exact.items():
        module = name.rpartition(".")[0]
        error = _number(_relative(their_gradients[name].double(), gradient))
        rounding[module] = max(error, rounding.get(module, 0.0))
    return [
        replace(one, in_float64=errors[one.name], rounding=rounding[one.name.rpartition(".")[0]]) for one in found
    ]


class _Wide(TorchFunctionMode):
    """Within it float64 stays float64: what a model computes in fp32, whatever it computes in, is not rounded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def _precision(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return _Wide() if dtype is torch.float64 else nullcontext()


def _transformers(
    folder: Path, documents: list[list[int]], dtype: torch.dtype = torch.float32
) -> tuple[_Seen, float, dict[str, Tensor]]:
    """What its modules gave, its loss, and gradients of the parameters that it trains."""
    try:
        from transformers import DeepseekV4ForCausalLM  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "parity compares with transformers, which is not installed (or has no DeepSeek-V4); install it with "
            "`pip install transformers==5.23.0`"
        ) from None
    model = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.double() if dtype is torch.float64 else model
    modules: dict[str, nn.Module] = {}
    for i, layer in enumerate(model.model.layers):
        modules |= {f"layers.{i}.attn": layer.self_attn, f"layers.{i}.ffn": layer.mlp, f"layers.{i}": layer}
    losses = []
    with _watching({**modules, "norm": model.model.norm}) as seen, _precision(dtype):
        for document in documents:
            tokens = torch.tensor([document])
            logits = model(input_ids=tokens, use_cache=False).logits[0].to(dtype)
            seen.keep("head", logits)
            losses.append(F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum"))
        total = torch.stack(losses).sum()
        total.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen, float(total.detach()), trained


def _ours(model: DeepSeekV4, documents: list[list[int]]) -> tuple[_Seen, float, dict[str, Tensor]]:
    modules: dict[str, nn.Module] = {}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Sublayers)
        modules |= {f"layers.{i}.attn": layer.attn, f"layers.{i}.ffn": layer.ffn, f"layers.{i}": layer}
    tokens = torch.tensor([t for document in documents for t in document])
    layout = PackedLayout.build([len(d) for d in documents], model.config.ratios)
    with _watching({**modules, "norm": model.norm}) as seen, _precision(model.compute_dtype):
        loss = model(Batch(tokens, torch.ones(len(tokens)), layout), with_losses=False).losses["lm"]
        loss.backward()
    seen.outputs["head"] = model.logits(documents)  # a row's logits are never held in training
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return seen, float(loss.detach()), gradients


@contextmanager
def _watching(modules: dict[str, nn.Module]) -> Iterator[_Seen]:
    """Keep what the modules return, in the order of the dict."""
    seen = _Seen({name: [] for name in modules})

    def keeper(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            found = output[0] if isinstance(output, tuple) else output
            assert isinstance(found, Tensor)
            seen.keep(name, found)

        return hook

    handles = [module.register_forward_hook(keeper(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _module_error(name: str, ours: _Seen, theirs: _Seen) -> ModuleError:
    a, b = ours.values(name), theirs.values(name)
    forward = _number(float((a - b).abs().max() / b.abs().max()))
    if name == "head":
        return ModuleError(name, forward, None)
    a, b = ours.gradients(name), theirs.gradients(name)
    return ModuleError(name, forward, _number(float((a - b).norm() / b.norm())))


def _errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """By parameter, under transformers' names, how far its gradients are apart."""
    renamed = transformers_names(ours)
    return {name: _number(_relative(renamed[name], gradient)) for name, gradient in theirs.items()}


def _relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `b`; 0 without a difference."""
    apart = float((a - b).norm())
    return apart and float(apart / b.norm())


def _rows(output: Tensor) -> Tensor:
    """[1, S, ...] of transformers and [T, ...] of ours as [T, values]."""
    return output.reshape(-1, output.shape[-1])


def _number(error: float) -> float:
    return float("inf") if math.isnan(error) else error  # NaN on one side agrees with nothing
