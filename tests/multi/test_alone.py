"""What a rank shares with no other is used where it lies: FSDP neither copies it nor its gradient.

That losses and weights under such layouts are those of one rank is in `test_layouts.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.multi.layouts import Case, recipe, take_step
from tests.processes import fullweight
from torch import nn

from fullweight.core.tensors import local_part
from fullweight.models.deepseek_v4.sharding import cut_of
from fullweight.parallel.mesh import joined
from fullweight.train.assemble import assemble
from fullweight.train.run_folder import RunFolder

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "experts": (2, ("parallel.expert=2",)),
    "heads": (2, ("parallel.tensor=2",)),
    "heads and experts": (2, ("parallel.tensor=2", "parallel.expert=2")),
    "all": (2, ("parallel.pipeline=2",)),
    "all, late": (2, ("parallel.pipeline=2", "parallel.schedule='zbv'", "parallel.virtual_stages=2")),
}


def place(parameter: nn.Parameter) -> int:
    return local_part(parameter).data_ptr()


def write_places(arguments: list[str]) -> int:
    """On every rank: one step of each layout; which parameters modules used where the optimiser has them."""
    with joined("cpu") as ranks:
        for name, (count, settings) in LAYOUTS.items():
            assert count == ranks.size
            run = assemble(recipe(Case(count, settings)), RunFolder(Path("never-written")), ranks)
            homes = {key: place(parameter) for key, parameter in run.model.named_parameters()}
            used: dict[str, bool] = {}

            def look(module: nn.Module, _inputs: object, prefix: str, homes=homes, used=used) -> None:  # type: ignore[no-untyped-def]
                for key, parameter in module.named_parameters(prefix, recurse=False):
                    used[key] = place(parameter) == homes[key]

            for prefix, module in run.model.named_modules():
                if prefix:
                    module.register_forward_pre_hook(lambda m, i, prefix=prefix, look=look: look(m, i, prefix))
            take_step(run, 0)
            run.state.loader.close()
            Path(arguments[0], f"{name}-{ranks.rank}.json").write_text(json.dumps(used))
        ranks.barrier()
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    ended = fullweight(folder, ranks=2, call=f"{__name__}:write_places")
    assert ended.ok, ended.output
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_shared_is_not_copied(name: str, folder: Path) -> None:
    for rank in (0, 1):
        used: dict[str, bool] = json.loads((folder / f"{name}-{rank}.json").read_text())
        kinds = {axis for axis in ("expert", "tensor") if f"parallel.{axis}=2" in LAYOUTS[name][1]}
        for key, in_place in used.items():
            cut = cut_of(key)
            assert in_place == (name.startswith("all") or (cut is not None and cut.axis in kinds)), key
        assert set(used.values()) == {True} if name.startswith("all") else {True, False}
