"""Parity with transformers' DeepseekV4ForCausalLM: its model from ours, and the comparison.

The map from our names to transformers' is written here by hand and shares nothing with the package's export.
transformers runs each document of a pack in a call of its own, eagerly, without cache.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullweight.checkpoint.hf import export_checkpoint, load_model
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import available_operations

from .cases import Case, draw_documents, make_batch, randomise

# Gradients below this share of the whole gradient's norm are rounding (the mixing of streams that are still
# identical in the first layer has none in exact arithmetic) and are held to it absolutely.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Errors:
    """Largest logit error relative to the largest logit; largest relative gradient error and whose it is."""

    logits: float
    gradient: float
    worst_parameter: str
    num_parameters: int


_RENAMES = [
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.experts\.gate_up$", ".experts.gate_up_proj"),
    (r"\.experts\.down$", ".experts.down_proj"),
]


def hf_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named as in our model under transformers' names; the MTP block is dropped."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("mtp."):
            continue
        prefix, _, kind = name.rpartition(".shared_experts.")
        if prefix:
            stem = f"model.{prefix.replace('.ffn', '.mlp')}.shared_experts."
            if kind == "down":
                renamed[stem + "down_proj.weight"] = tensor
            else:
                half = tensor.shape[0] // 2
                renamed[stem + "gate_proj.weight"] = tensor[:half]
                renamed[stem + "up_proj.weight"] = tensor[half:]
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901 - rules apply in turn
        renamed[name] = tensor
    return renamed


def build_hf(model: DeepSeekV4) -> nn.Module:
    """transformers' model from our config.json and weights, fp32 and eager."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config.from_dict(model.config.to_published())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    assert config.qk_rope_head_dim == model.config.qk_rope_head_dim
    assert config.rope_parameters["compress"]["rope_type"] == "yarn"
    hf = DeepseekV4ForCausalLM(config).float()
    result = hf.load_state_dict(hf_tensors(model.state_dict()), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all("inv_freq" in name for name in result.missing_keys), result.missing_keys
    return hf


def hf_logits(hf: nn.Module, documents: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [length, V] of each document in a call of its own."""
    return [hf(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents]


@dataclass(frozen=True)
class _Expected:
    model: DeepSeekV4
    documents: list[list[int]]
    logits: list[Tensor]
    gradients: dict[str, Tensor | None]


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> _Expected:
    model = DeepSeekV4(case.config, ops="reference")
    randomise(model, case.number)
    documents = draw_documents(model, case.lengths, case.number)
    hf = build_hf(model)
    logits = hf_logits(hf, documents)
    _language_loss(logits, documents).backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    return _Expected(model, documents, [x.detach() for x in logits], gradients)


def measure(case: Case, ops: str) -> Errors:
    """Run a case through both models, all documents in one pack on our side."""
    expected = _expected(case)
    model = DeepSeekV4(case.config, ops=ops)
    model.load_state_dict(expected.model.state_dict())
    logits = model.logits(expected.documents)
    worst_logit = max(
        relative_to_largest(ours, theirs) for ours, theirs in zip(logits, expected.logits, strict=True)
    )
    model(make_batch(expected.documents, case.config)).losses["lm"].backward()
    gradients = hf_tensors(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    )
    trained = {n: g for n, g in expected.gradients.items() if g is not None}
    floor = NEGLIGIBLE * float(torch.stack([g.norm() for g in trained.values()]).norm())
    errors = {n: float((gradients[n] - g).norm() / g.norm().clamp(min=floor)) for n, g in trained.items()}
    untrained = expected.gradients.keys() - trained.keys()
    assert all(".indexer." in n or ".compressor." in n for n in untrained), untrained
    assert all(not gradients[n].any() for n in untrained)
    worst = max(errors, key=errors.__getitem__)
    return Errors(worst_logit, errors[worst], worst, len(trained))


@dataclass(frozen=True)
class NarrowErrors:
    """bf16 against fp32 of the same side: logit error of the median token and root mean square over tokens, both
    relative to the logits' root mean square; norm of the whole gradient's error relative to the gradient's."""

    typical_token: float
    mean_square: float
    gradient: float


def measure_bfloat16(case: Case, folder: Path) -> dict[str, NarrowErrors]:
    """By set of operations, and "transformers"; all start from a checkpoint of bf16 weights, left in `folder`.

    transformers loads it by from_pretrained, which keeps in fp32 what its authors want there.
    """
    from transformers import AutoModelForCausalLM

    model = DeepSeekV4(case.config, ops="reference")
    randomise(model, case.number)
    documents = draw_documents(model, case.lengths, case.number)
    export_checkpoint(model, folder)
    model = load_model(folder, ops="reference")
    exact = _ours(model, documents)
    errors = {}
    for ops in available_operations():
        narrow = DeepSeekV4(model.config, torch.bfloat16, ops=ops)
        narrow.load_state_dict(model.state_dict())
        errors[ops] = _narrow_errors(_ours(narrow, documents), exact)
    theirs = []
    for dtype in (torch.bfloat16, torch.float32):
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        logits = hf_logits(hf, documents)
        _language_loss(logits, documents).backward()
        theirs.append((torch.cat(logits).detach().float(), _gradients(hf)))
    errors["transformers"] = _narrow_errors(*theirs)
    return errors


def _ours(model: DeepSeekV4, documents: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    model(make_batch(documents, model.config)).losses["lm"].backward()
    return torch.cat(model.logits(documents)), _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def _narrow_errors(
    narrow: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]
) -> NarrowErrors:
    scale = exact[0].square().mean().sqrt()
    per_token = (narrow[0] - exact[0]).square().mean(-1)
    wrong = torch.stack([(narrow[1][n] - g).norm() for n, g in exact[1].items()]).norm()
    whole = torch.stack([g.norm() for g in exact[1].values()]).norm()
    median, mean = per_token.sqrt().median() / scale, per_token.mean().sqrt() / scale
    return NarrowErrors(float(median), float(mean), float(wrong / whole))


def _language_loss(logits: list[Tensor], documents: list[list[int]]) -> Tensor:
    """Sum over documents of every token's negative log-likelihood, in fp32."""
    pairs = [(x.float(), d) for x, d in zip(logits, documents, strict=True) if len(d) > 1]
    return torch.stack([F.cross_entropy(x[:-1], torch.tensor(d[1:]), reduction="sum") for x, d in pairs]).sum()


def relative_to_largest(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
