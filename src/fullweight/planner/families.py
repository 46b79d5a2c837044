"""Shapes of models of other families: published ones by name, and any from its config.json.

The planner trains none of them; it predicts their step times, so that it can be judged on what others measured.
`shape_of_file` reads the config.json of the usual families (GPT-2, Llama, Mistral, Qwen, Mixtral, Qwen3-MoE,
DeepSeek-V3, Kimi-K2, GPT-OSS), or a TOML file with the keys of `Shape`. Left out: layers of other kinds
(state-space, linear attention), shared experts of another width than the routed ones. Imports no torch.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fullweight.core.config import nearest, read_toml
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.planner.shapes import Shape, Work, work_of, work_of_v4


@cache
def families() -> dict[str, Shape]:
    """Shapes of published models by name."""
    text = resources.files("fullweight.planner").joinpath("families.toml").read_text(encoding="utf-8")
    return {
        name: Shape.resolve({"name": name, **entry}, f"[{name}]") for name, entry in tomllib.loads(text).items()
    }


@cache
def family_work(name: str, sequence: int) -> Work:
    """One document of `sequence` tokens of a published model, DeepSeek-V4's included ("v4-pro")."""
    if name.startswith("v4-"):
        return work_of_v4(DeepSeekV4Config.preset(name[3:]), [sequence])
    return work_of(families()[name], sequence)


def shape_of_file(path: Path) -> Shape:
    """The shape in a config.json or a TOML file; its name is the file's. Raises ConfigError for other families."""
    if path.suffix == ".toml":
        made: Shape = Shape.resolve({"name": path.stem, **read_toml(path, "model file")}, str(path))
        return made
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no config.json ({error}); give a model's own") from None
    family = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(family, str) or family not in _READERS:
        raise ConfigError(
            f"{path} describes model_type {family!r}, whose layers have no shape here; "
            f"{nearest(str(family), list(_READERS))}"
        )
    try:
        read: Shape = Shape.resolve({"name": path.stem, **_READERS[family](values)}, str(path))
    except KeyError as missing:
        raise ConfigError(f"{path} has no {missing}; a config.json of {family!r} does") from None
    return read


def _plain(v: Mapping[str, Any]) -> dict[str, Any]:
    """Grouped attention and dense feed-forward layers."""
    heads = v["num_attention_heads"]
    return {
        "layers": v["num_hidden_layers"],
        "hidden": v["hidden_size"],
        "heads": heads,
        "kv_heads": v.get("num_key_value_heads") or heads,
        "head_dim": v.get("head_dim") or v["hidden_size"] // heads,
        "ffn": v["intermediate_size"],
        "vocab": v["vocab_size"],
    }


def _gpt2(v: Mapping[str, Any]) -> dict[str, Any]:
    d, heads = v["n_embd"], v["n_head"]
    sizes = {"layers": v["n_layer"], "hidden": d, "heads": heads, "kv_heads": heads, "head_dim": d // heads}
    return sizes | {"ffn": v.get("n_inner") or 4 * d, "vocab": v["vocab_size"], "gated": False}


def _mixtral(v: Mapping[str, Any]) -> dict[str, Any]:
    routed = {"experts": v["num_local_experts"], "top_k": v["num_experts_per_tok"]}
    return _plain(v) | routed | {"ffn": 0, "expert_ffn": v["intermediate_size"]}


def _gpt_oss(v: Mapping[str, Any]) -> dict[str, Any]:
    return _mixtral(v) | {"window": v["sliding_window"]}


def _qwen3_moe(v: Mapping[str, Any]) -> dict[str, Any]:
    routed = {"experts": v["num_experts"], "top_k": v["num_experts_per_tok"]}
    return _plain(v) | routed | {"ffn": 0, "expert_ffn": v["moe_intermediate_size"]}


def _deepseek_v3(v: Mapping[str, Any]) -> dict[str, Any]:
    return _plain(v) | {
        "head_dim": v["v_head_dim"],
        "kv_heads": v["num_attention_heads"],
        "experts": v["n_routed_experts"],
        "top_k": v["num_experts_per_tok"],
        "expert_ffn": v["moe_intermediate_size"],
        "shared_experts": v["n_shared_experts"],
        "dense_layers": v["first_k_dense_replace"],
        "q_rank": v.get("q_lora_rank") or 0,
        "kv_rank": v["kv_lora_rank"],
        "rope_dim": v["qk_rope_head_dim"],
        "mtp_layers": v.get("num_nextn_predict_layers") or 0,
    }


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _plain,
    "qwen3": _plain,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}
