"""What a training method is: which samples it takes and what the loss of a micro-batch is.

A method is its configuration with behaviour: a frozen object, chosen in a recipe by name, that turns one
packed micro-batch into named loss *sums* and says before the forward pass what each sum is to be divided by.
The loop adds the normalisers of all micro-batches and ranks first, so a token weighs the same wherever it
lies. The loop knows no method by name.

Adding one: a subclass in its own file, one line in `methods/__init__.py`, its test, one recipe.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fullweight.core.config import Config
from fullweight.core.errors import DataError
from fullweight.core.types import Batch


class MethodOutput(Protocol):
    """What a method hands to the loop for one micro-batch."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Scalar fp32 sums by component, attached to the graph."""

    @property
    def expert_counts(self) -> Tensor:
        """[MoE layers, experts] int64: real tokens that chose each expert."""

    @property
    def dropped(self) -> Tensor:
        """[MoE layers] int64: of those choices, the ones that found their expert at its capacity."""


class Method(Config):
    """Base of every method; subclasses set `name` to a Literal and the fields that recipes may change."""

    sample_field: ClassVar[str]
    """The field that every sample of this method must carry."""
    generates: ClassVar[bool]
    """Whether the held-out samples are questions that the model answers, to be looked at and scored."""

    main_loss: ClassVar[str] = "lm"
    """The component that the method exists for; a step in which its normaliser is 0 is an error."""

    name: str

    @abstractmethod
    def loss_counts(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Normaliser of each loss sum of `batch`, known before the forward pass."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> MethodOutput:
        """Loss sums of `batch`; one call of `model`, so that sharding hooks run once."""

    def check_sample(self, sample: dict[str, Any], source: str) -> None:
        """Raise DataError when the samples of a source are not of this method's kind."""
        if self.sample_field not in sample:
            raise DataError(
                f"{source}: a sample has the fields {sorted(sample)}, method {self.name!r} needs "
                f"{self.sample_field!r}; map the columns under data.sources or choose another method"
            )
