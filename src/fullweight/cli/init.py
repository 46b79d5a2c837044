"""`fullweight init`: a fresh checkpoint of any V4 configuration."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What matrices are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def init_command(
    *,
    config: Annotated[Path, typer.Option(help="config.json of a DeepSeek-V4 model, published form")],
    out: Annotated[Path, typer.Option(help="new or empty folder for the checkpoint")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.BFLOAT16,
) -> None:
    """Write a checkpoint with fresh weights under the published names."""
    from fullweight.checkpoint.hf import export_checkpoint
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.models.deepseek_v4.init import initialise
    from fullweight.models.deepseek_v4.model import DeepSeekV4

    architecture = DeepSeekV4Config.from_file(config)
    model = initialise(DeepSeekV4(architecture), seed)
    export_checkpoint(model, out, dtype.value)
    typer.echo(f"{architecture.num_parameters(mtp=True):,} parameters (seed {seed}, {dtype.value}) in {out}")
