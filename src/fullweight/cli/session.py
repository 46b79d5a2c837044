"""A model to talk to, from a run folder or a checkpoint folder: shared by `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullweight.core.errors import CheckpointError

if TYPE_CHECKING:
    from fullweight.api import LoadedModel
    from fullweight.data.render import EncodingOptions
    from fullweight.data.tokenizer import Tokenizer

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Session:
    """Model, tokenizer and encoding that belong together."""

    model: LoadedModel
    tokenizer: Tokenizer
    options: EncodingOptions

    def answer(self, messages: Sequence[dict[str, Any]], sampling: Sampling) -> str:
        """The text that follows the conversation, without its end token."""
        from fullweight.data.render import encode_prompt

        return self._continue(encode_prompt(list(messages), self.tokenizer, self.options), sampling)

    def complete(self, text: str, sampling: Sampling) -> str:
        """The text that follows plain text: for models trained on documents."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode_plain([text])[0]]
        return self._continue(ids, sampling)

    def _continue(self, prompt: list[int], sampling: Sampling) -> str:
        [ids] = self.model.generate(
            [prompt],
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_ids=[self.tokenizer.eos_id],
            seed=sampling.seed,
        )
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] == self.tokenizer.eos_id else ids)


def open_session(folder: Path) -> Session:
    """From a run folder (its export, or else its newest checkpoint) or a folder with published weights.

    Raises CheckpointError when it is neither; ConfigError when its tokenizer is missing.
    """
    from fullweight.api import load
    from fullweight.data.render import EncodingOptions
    from fullweight.data.tokenizer import load_tokenizer
    from fullweight.train.loop import load_config
    from fullweight.train.run_folder import RunFolder

    run = RunFolder(folder)
    if run.ledger.is_file():
        options = load_config(run).data.encoding
        if run.export.is_dir():
            return _session(load(run.export), load_tokenizer(run.export), options)
        return _session(_from_checkpoint(run), load_tokenizer(run.tokenizer), options)
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "does not exist"
        raise CheckpointError(f"{folder} {found}; give a run folder or a checkpoint folder")
    return _session(load(folder), load_tokenizer(folder), EncodingOptions())


def _session(model: LoadedModel, tokenizer: Tokenizer, options: EncodingOptions) -> Session:
    from fullweight.train.config import check_vocabulary

    check_vocabulary(tokenizer.vocab_size, model.config, "the tokenizer's vocabulary")
    return Session(model, tokenizer, options)


def _from_checkpoint(run: Any) -> LoadedModel:
    from fullweight.api import LoadedModel
    from fullweight.checkpoint.generations import newest
    from fullweight.checkpoint.hf import check_room
    from fullweight.checkpoint.manifest import verify
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.models.deepseek_v4.model import DeepSeekV4
    from fullweight.train.state import load_weights

    architecture = DeepSeekV4Config.from_file(run.model)
    check_room(architecture, str(run.root))
    model = DeepSeekV4(architecture)
    load_weights(model, verify(newest(run.checkpoints)))
    return LoadedModel(model)
