"""Learning from given text: supervised fine-tuning (SFT) and continued pre-training.

Both maximise the likelihood of the tokens whose loss mask is set; they differ in what a sample is. SFT takes
conversations and trains on what the assistant said (the encoding sets the mask); continued pre-training takes
plain documents and trains on all of it. The model computes the components: next-token loss, MTP, the
indexer's KL and the sequence-wise balance loss (DeepSeek-V4 report, sections 2 and 4).

Left out: sample weights and label smoothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from fullweight.core.types import Batch
from fullweight.methods.base import Method, MethodOutput


class _Likelihood(Method):
    """The model's own losses over the masked tokens."""

    def loss_counts(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return model.loss_counts(batch)  # type: ignore[operator]

    def forward(self, model: nn.Module, batch: Batch) -> MethodOutput:
        return model(batch)


class SFT(_Likelihood):
    """Supervised fine-tuning on conversations."""

    sample_field: ClassVar[str] = "messages"
    generates: ClassVar[bool] = True

    name: Literal["sft"] = "sft"


class Pretrain(_Likelihood):
    """Continued pre-training on plain text."""

    sample_field: ClassVar[str] = "text"
    generates: ClassVar[bool] = False

    name: Literal["pretrain"] = "pretrain"
