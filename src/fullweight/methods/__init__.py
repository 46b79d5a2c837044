"""Training methods, one small file each; this table is all that makes one selectable by `method.name`."""

from typing import Annotated

from pydantic import Field

from fullweight.methods.base import Method
from fullweight.methods.sft import SFT, Pretrain

METHODS: dict[str, type[Method]] = {"sft": SFT, "pretrain": Pretrain}
MethodConfig = Annotated[SFT | Pretrain, Field(discriminator="name")]

__all__ = ["METHODS", "SFT", "Method", "MethodConfig", "Pretrain"]
