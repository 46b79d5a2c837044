"""Sizes of a DeepSeek-V4 model: the published config.json, validated, and presets.

Field names are those of the published config.json, so that any of them loads and what is exported is read by
every other tool. `compress_ratios` gives each layer its kind: 0 sliding window only, 4 compressed-sparse
attention (CSA), 128 heavily compressed attention (HCA). This module imports no torch.

Left out: keys of the published file that do not change the mathematics here (quantization_config and
expert_dtype describe stored weights, dspark_* describes a draft model); they are kept in `extra` and
written back on export.
"""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from fullweight.core.config import Config, nearest
from fullweight.core.errors import ConfigError
from fullweight.core.strict_json import parse_json


class LayerKind(StrEnum):
    """How a layer attends; the value is the name that transformers gives it."""

    SLIDING = "sliding_attention"
    CSA = "compressed_sparse_attention"
    HCA = "heavily_compressed_attention"


CSA_RATIO = 4
HCA_RATIO = 128
_HEAD: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
_MOST_PARAMETERS = 10**15  # far above any model, far below where sizes overflow
_KINDS = {0: LayerKind.SLIDING, CSA_RATIO: LayerKind.CSA, HCA_RATIO: LayerKind.HCA}


class RopeScaling(Config):
    """YaRN parameters of the compressed layers' rotary embedding."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(16.0, ge=1.0)
    original_max_position_embeddings: PositiveInt = 65536
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) is below beta_slow ({self.beta_slow}); exchange them")
        return self


class DeepSeekV4Config(Config):
    """A DeepSeek-V4 architecture; `preset(name)` and `from_file(config.json)` make one.

    >>> DeepSeekV4Config.preset("flash").num_parameters(mtp=False)
    284332230231
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    head_dim: PositiveInt = 512
    qk_rope_head_dim: PositiveInt = 64
    q_lora_rank: PositiveInt
    o_groups: PositiveInt
    o_lora_rank: PositiveInt = 1024
    sliding_window: PositiveInt = 128
    compress_ratios: tuple[int, ...]
    index_n_heads: PositiveInt = 64
    index_head_dim: PositiveInt = 128
    index_topk: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: Literal[1] = 1
    num_experts_per_tok: PositiveInt = 6
    moe_intermediate_size: PositiveInt
    num_hash_layers: int = Field(3, ge=0)
    scoring_func: Literal["sqrtsoftplus"] = "sqrtsoftplus"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    norm_topk_prob: Literal[True] = True
    routed_scaling_factor: float = Field(gt=0)
    swiglu_limit: float = Field(10.0, gt=0)
    hc_mult: PositiveInt = 4
    hc_sinkhorn_iters: PositiveInt = 20
    hc_eps: float = Field(1e-6, gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    rope_theta: float = Field(10000.0, gt=1)
    compress_rope_theta: float = Field(160000.0, gt=1)
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: PositiveInt = 1048576
    num_nextn_predict_layers: int = Field(1, ge=0, le=1)
    initializer_range: float = Field(0.02, gt=0)
    num_key_value_heads: Literal[1] = 1
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    attention_dropout: float = Field(0.0, ge=0, le=0)
    tie_word_embeddings: Literal[False] = False
    bos_token_id: int = Field(0, ge=0)
    eos_token_id: int = Field(1, ge=0)
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("compress_ratios")
    @classmethod
    def _known_ratios(cls, ratios: tuple[int, ...]) -> tuple[int, ...]:
        unknown = sorted(set(ratios) - set(_KINDS))
        if unknown:
            raise ValueError(f"ratios {unknown} are not among 0 (sliding), 4 (CSA) and 128 (HCA)")
        return ratios

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers, mtp = self.num_hidden_layers, self.num_nextn_predict_layers
        if len(self.compress_ratios) < layers + mtp:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries, expected {layers + mtp}: "
                f"{layers} layers and {mtp} MTP layer"
            )
        if mtp and self.compress_ratios[layers] != 0:
            raise ValueError("the MTP layer (compress_ratios after the last layer) must have ratio 0")
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not divisible by o_groups "
                f"({self.o_groups}); use {_divisors(self.num_attention_heads)}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds n_routed_experts "
                f"({self.n_routed_experts})"
            )
        for name in ("head_dim", "index_head_dim"):
            if getattr(self, name) < self.qk_rope_head_dim:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is below qk_rope_head_dim ({self.qk_rope_head_dim})"
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE rotates pairs")
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} ({getattr(self, name)}) is outside the vocabulary of {self.vocab_size}")
        if self.sliding_window > self.max_position_embeddings:
            raise ValueError(
                f"sliding_window ({self.sliding_window}) exceeds max_position_embeddings "
                f"({self.max_position_embeddings})"
            )
        if self.num_parameters(mtp=True) > _MOST_PARAMETERS:
            raise ValueError(
                f"these sizes make {self.num_parameters(mtp=True):.1e} parameters, expected at most "
                f"{_MOST_PARAMETERS:.0e}; check them, such as hidden_size, vocab_size and n_routed_experts"
            )
        return self

    # ---- construction -------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DeepSeekV4Config:
        """A named architecture (`PRESETS`), with fields changed by keyword."""
        if name not in PRESETS:
            raise ConfigError(f"unknown model preset {name!r}; {nearest(name, list(PRESETS))}")
        return cls.resolve({**PRESETS[name], **changes}, f"model preset {name}")

    @classmethod
    def from_file(cls, path: str | Path) -> DeepSeekV4Config:
        """Read a published config.json (or the folder that holds it)."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"no config.json at {path}") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path} is {error}") from None
        if not isinstance(values, dict) or values.get("model_type") != "deepseek_v4":
            found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
            raise ConfigError(f"{path} describes model_type {found!r}; expected 'deepseek_v4'")
        return cls.from_published(values, str(path))

    @classmethod
    def from_published(cls, values: dict[str, Any], source: str = "config.json") -> DeepSeekV4Config:
        """From the key-value pairs of a published config.json; keys unknown here are kept in `extra`.

        A DSpark release's `mtp.*` tensors are draft blocks, not the MTP block that its num_nextn_predict_layers
        counts: the model has none, and the published count is kept in `extra`.
        """
        known = {k: v for k, v in values.items() if k in cls.model_fields and k != "extra"}
        extra = {k: v for k, v in values.items() if k not in cls.model_fields and _HEAD.get(k) != v}
        if "dspark_block_size" in extra:
            extra["num_nextn_predict_layers"] = known.get("num_nextn_predict_layers", 1)
            known["num_nextn_predict_layers"] = 0
        return cls.resolve({**known, "extra": extra}, source)

    def to_published(self, **changes: Any) -> dict[str, Any]:
        """The pairs of a config.json that DeepSeek's code, vLLM and transformers read."""
        own = self.model_dump(mode="json", exclude={"extra"})
        return {**_HEAD, **own, **self.extra, **changes}

    # ---- what a layer is ----------------------------------------------------------------------------

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of main layer `layer`; index `num_hidden_layers` is the MTP layer (sliding)."""
        return _KINDS[self.compress_ratios[layer]]

    def is_hash_layer(self, layer: int) -> bool:
        return layer < min(self.num_hash_layers, self.num_hidden_layers)

    @property
    def ratios(self) -> tuple[int, ...]:
        """Distinct compression ratios of the main layers, without 0."""
        return tuple(sorted({r for r in self.compress_ratios[: self.num_hidden_layers] if r}))

    def count_layers(self, kind: LayerKind) -> int:
        """Main layers of one kind."""
        return sum(self.layer_kind(i) is kind for i in range(self.num_hidden_layers))

    def expert_capacity(self, factor: float, row_tokens: int) -> int:
        """Choices of one row that an expert takes, of an even share of the row's tokens times `factor`."""
        return math.ceil(factor * row_tokens * self.num_experts_per_tok / self.n_routed_experts)

    # ---- parameters ---------------------------------------------------------------------------------

    def num_parameters(self, mtp: bool) -> int:
        """Trainable parameters, in closed form (router biases and hash tables are buffers)."""
        d, c, rank = self.hidden_size, self.head_dim, self.q_lora_rank
        head = self.vocab_size * d
        hc_head = self.hc_mult**2 * d + self.hc_mult + 1
        total = self.num_hidden_layers * self._block_parameters() + 2 * head + d + hc_head
        indexer = self.index_n_heads * (self.index_head_dim * rank + d)
        csa = self._compressor(2 * c, CSA_RATIO, c) + indexer
        csa += self._compressor(2 * self.index_head_dim, CSA_RATIO, self.index_head_dim)
        total += self.count_layers(LayerKind.CSA) * csa
        total += self.count_layers(LayerKind.HCA) * self._compressor(c, HCA_RATIO, c)
        if mtp and self.num_nextn_predict_layers:
            total += self._block_parameters() + 2 * d * d + 3 * d + hc_head
        return total

    def _compressor(self, width: int, ratio: int, out: int) -> int:
        return 2 * width * self.hidden_size + ratio * width + out

    def _block_parameters(self) -> int:
        d, c, heads, rank = self.hidden_size, self.head_dim, self.num_attention_heads, self.q_lora_rank
        attention = d * rank + rank + c * heads * rank + c * d + c
        attention += c * heads * self.o_lora_rank + self.o_lora_rank * self.o_groups * d + heads
        moe = 3 * d * self.moe_intermediate_size * (self.n_routed_experts + 1) + self.n_routed_experts * d
        n = self.hc_mult
        return attention + moe + 2 * ((2 + n) * n * (n * d + 1) + 3) + 2 * d


def yarn_correction_range(config: DeepSeekV4Config) -> tuple[int, int]:
    """(low, high): rotary pairs between which YaRN ramps from no interpolation to full.

    The published sizes give (15, 25).
    """
    scaling, dim, theta = config.rope_scaling, config.qk_rope_head_dim, config.compress_rope_theta

    def pair(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), dim - 1)


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)


_RELEASED = {
    "extra": {
        "torch_dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }
}

PRESETS: dict[str, dict[str, Any]] = {
    "flash": {
        **_RELEASED,
        "vocab_size": 129280,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "index_topk": 512,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    },
    "pro": {
        **_RELEASED,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "index_topk": 1024,
        "routed_scaling_factor": 2.5,
        "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0],
    },
    # Every block kind at a size whose training step takes milliseconds on a CPU: for tests.
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 16,
        "index_n_heads": 8,
        "index_head_dim": 16,
        "index_topk": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [0, 4, 128, 4, 0],
    },
    # The quickstart: learns generated tasks in minutes on two cores.
    "small": {
        "vocab_size": 512,
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 96,
        "o_groups": 2,
        "o_lora_rank": 64,
        "sliding_window": 64,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [0, 4, 128, 4, 0, 0],
    },
    # The benchmark: large enough that arithmetic, not Python, should set the speed of two cores.
    "bench": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "head_dim": 128,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 256,
        "o_groups": 2,
        "o_lora_rank": 128,
        "sliding_window": 64,
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "compress_ratios": [0, 128, 4, 128, 4, 0, 0],
    },
}
