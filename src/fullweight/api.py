"""The documented Python interface: `fullweight.load(folder)`.

>>> model = fullweight.load("runs/quickstart/export")     # doctest: +SKIP
>>> model.logits([[1, 2, 3]])[0].shape                    # doctest: +SKIP
torch.Size([3, 512])
>>> model.generate([[1, 2, 3]], max_new_tokens=8)         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fullweight.checkpoint.hf import load_model
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.cache import generate
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedModel:
    """A model ready for inference; `model` is the underlying module, `config` its sizes."""

    def __init__(self, model: DeepSeekV4) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def config(self) -> DeepSeekV4Config:
        return self.model.config

    def logits(self, documents: Sequence[Sequence[int]]) -> list[Tensor]:
        """Next-token logits [length, vocabulary] (fp32) for each document of token ids, each as if alone."""
        return self.model.logits(documents)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """New token ids for each prompt; stops at the end-of-sentence token unless told otherwise."""
        stops = [self.config.eos_token_id] if stop_ids is None else stop_ids
        return generate(
            self.model,
            prompts,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop_ids=stops,
            seed=seed,
        )


def load(folder: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> LoadedModel:
    """Load a checkpoint folder under the published names (config.json and safetensors shards).

    `dtype` is what activations are computed in; weights are held in float32. Raises FullweightError
    naming the file on a missing, damaged or foreign checkpoint.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use {' or '.join(map(repr, _DTYPES))}")
    return LoadedModel(load_model(folder, _DTYPES[dtype]))
