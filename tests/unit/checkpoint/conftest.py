"""Small checkpoints in every published format, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fullweight.checkpoint.synthetic import write_synthetic

from .formats import tiny, with_drafts


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Synthetic checkpoints by layout, not to be changed; "dspark" is fp4 with draft blocks. Made once each."""
    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            config = with_drafts(tiny()) if layout == "dspark" else tiny()
            folder = tmp_path_factory.mktemp("published") / layout
            made[layout] = write_synthetic(config, folder, "fp4" if layout == "dspark" else layout)
        return made[layout]

    return make
