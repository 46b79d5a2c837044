"""The documented Python interface: `fullweight.load(folder)`.

>>> model = fullweight.load("runs/quickstart/export")     # doctest: +SKIP
>>> model.logits([[1, 2, 3]])[0].shape                    # doctest: +SKIP
torch.Size([3, 512])
>>> model.generate([[1, 2, 3]], max_new_tokens=8)         # doctest: +SKIP
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fullweight.checkpoint.hf import load_model
from fullweight.core.errors import ConfigError, DataError
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
        """Next-token logits [length, vocabulary] (fp32) for each document of token ids, each as if alone.

        Raises DataError on no document, an empty one, and what is no token id of this model.
        """
        return self.model.logits(_token_ids(documents, "documents"))

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
        """New token ids for each prompt; stops at the end-of-sentence token unless told otherwise.

        temperature 0 takes the likeliest token; otherwise tokens are drawn, by `seed`, from the smallest set that
        holds probability `top_p`. Raises DataError on prompts as `logits` does, ConfigError on a setting out of
        range: a prompt and its new tokens must fit the model's max_position_embeddings.
        """
        stops = [self.config.eos_token_id] if stop_ids is None else stop_ids
        ids = _token_ids(prompts, "prompts")
        _check_whole("max_new_tokens", max_new_tokens)
        _check_whole("seed", seed)
        longest, room = max((len(p) for p in ids), default=0), self.config.max_position_embeddings
        if longest + max_new_tokens > room:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's "
                f"max_position_embeddings ({room}); ask for at most {max(room - longest, 0)} new tokens"
            )
        return generate(
            self.model,
            ids,
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


def _token_ids(documents: Sequence[Sequence[int]], what: str) -> list[list[int]]:
    """Lists of ints from any sequences of whole numbers (NumPy's and torch's too)."""
    try:
        return [[operator.index(token) for token in document] for document in documents]
    except TypeError as error:
        raise DataError(f"{what} must be lists of token ids, such as [[1, 2, 3]]: {error}") from None


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ConfigError(f"{name} must be a whole number from 0 up, found {value!r}")
