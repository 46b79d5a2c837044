"""`fullweight init`: a fresh checkpoint of any V4 configuration."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fullweight.cli.bars import byte_bar
from fullweight.cli.session import MAX_SEED


class Dtype(StrEnum):
    """What matrices are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def init_command(
    *,
    config: Annotated[Path, typer.Option(help="config.json of a DeepSeek-V4 model, published form")],
    out: Annotated[Path, typer.Option(help="new or empty folder for the checkpoint")],
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.BFLOAT16,
) -> None:
    """Write a checkpoint with fresh weights under the published names, in the memory of a few of its rows."""
    from fullweight.checkpoint.export import check_place
    from fullweight.checkpoint.fresh import payload_bytes, write_fresh
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config

    architecture = DeepSeekV4Config.from_file(config)
    check_place(out)
    with byte_bar("init", payload_bytes(architecture, out, dtype.value)) as advance:
        write_fresh(architecture, out, dtype.value, seed, advance)
    typer.echo(f"{architecture.num_parameters(mtp=True):,} parameters (seed {seed}, {dtype.value}) in {out}")
