"""`fullweight parity` holds on a right model and names the module that is wrong, forward and backward."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.models.cases import randomise
from torch import Tensor

from fullweight.audit import parity
from fullweight.audit.parity import check_parity
from fullweight.checkpoint.export import FolderWeights, write_checkpoint
from fullweight.checkpoint.folder import PublishedFolder
from fullweight.checkpoint.hf import export_checkpoint, load_model
from fullweight.cli.main import main
from fullweight.core.errors import ConfigError
from fullweight.models.deepseek_v4.block import Sublayers
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

LENGTHS = (1, 5, 40, 130)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that leave no part idle."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"), ops="reference")
    randomise(model, 3)
    path = tmp_path_factory.mktemp("parity") / "model"
    export_checkpoint(model, path, "float32")
    return path


def test_a_right_model_agrees_module_by_module(folder: Path, tmp_path: Path) -> None:
    assert main(["parity", str(folder), "--documents", "1,5,40,130", "--json", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    names = [m["name"] for m in found["modules"]]
    assert names[:3] == ["layers.0.attn", "layers.0.ffn", "layers.0"]
    assert names[-2:] == ["norm", "head"]
    assert found["holds"]
    assert 0 < max(m["forward"] for m in found["modules"]) < 1e-4
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    config = DeepSeekV4Config.preset("tiny")
    assert len(names) == 3 * config.num_hidden_layers + 2
    assert "lm_head.weight" in {p["name"] for p in found["parameters"]}


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        ("layers.1.attn.wkv.weight", "layers.1.attn"),
        ("layers.2.ffn.shared_experts.down", "layers.2.ffn"),
        ("layers.3.hc_ffn_base", "layers.3"),
        ("norm.weight", "norm"),
        ("head.weight", "head"),
    ],
)
def test_a_wrong_weight_is_named_by_its_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, first: str
) -> None:
    def load(path: Path, **options: str) -> DeepSeekV4:
        model = load_model(path, **options)
        parameter = dict(model.named_parameters())[wrong]
        with torch.no_grad():
            parameter[-1] += 0.5 * parameter.abs().max() + 0.5
        return model

    monkeypatch.setattr(parity, "load_model", load)
    assert check_parity(folder, LENGTHS, ops="reference").first_forward == first


def test_a_wrong_gradient_is_named_although_the_forward_pass_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 2 * gradient

    def load(path: Path, **options: str) -> DeepSeekV4:
        model = load_model(path, **options)
        block = model.layers[2]
        assert isinstance(block, Sublayers)
        block.ffn_norm.register_forward_hook(lambda module, inputs, output: Doubled.apply(output))
        return model

    monkeypatch.setattr(parity, "load_model", load)
    assert main(["parity", str(folder), "--ops", "reference"]) == 1
    told = capsys.readouterr().out
    assert "forward differs" not in told
    assert "backward differs first, from the loss back, in layers.2.attn" in told
    assert "model.layers.2.post_attention_layernorm.weight" not in told  # its own gradient comes before the fault


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A young model, whose head's mixing gets 1e-7 of the gradient: fp32 leaves it two digits."""
    model = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny"), ops="reference"), 0)
    path = tmp_path_factory.mktemp("fresh") / "model"
    export_checkpoint(model, path, "float32")
    return path


def scaled(monkeypatch: pytest.MonkeyPatch, name: str, factor: float, only: torch.dtype | None = None) -> None:
    """From now on a loaded model's gradient of a parameter is wrong by a factor; in one compute type, or all."""

    def load(path: Path, **options: Any) -> DeepSeekV4:
        model = load_model(path, **options)
        if only in (None, model.compute_dtype):
            model.get_parameter(name).register_hook(lambda gradient: factor * gradient)
        return model

    monkeypatch.setattr(parity, "load_model", load)


def test_gradients_that_all_but_cancel_are_compared_in_float64(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding is no fault: beyond the bound in fp32, as transformers' own is, equal to six digits in float64."""
    found = [check_parity(fresh, (1, 5, 40), seed) for seed in range(3)]
    assert [(one.holds, one.bad_parameters) for one in found] == [(True, [])] * 3
    looked_at = [p for one in found for p in one.mostly_rounding]
    assert {p.name.rpartition(".")[0] for p in looked_at} == {"model.hc_head"}
    assert max(p.in_float64 or 0.0 for one in found for p in one.parameters) < 1e-6
    assert main(["parity", str(fresh), "--documents", "1,5,40"]) == 0
    assert "gradients that all but cancel, compared in float64: model.hc_head." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("hc_head_base", "model.hc_head.hc_base"),
        ("hc_head_scale", "model.hc_head.hc_scale"),
        ("layers.2.hc_attn_base", "model.layers.2.attn_hc.base"),
    ],
)
def test_a_tiny_gradient_that_is_wrong_by_a_hundredth_is_named(
    ours: str, theirs: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rounding is as large: in float64 it is not."""
    scaled(monkeypatch, ours, 1.01)
    found = check_parity(fresh, (1, 5, 40))
    assert [p.name for p in found.bad_parameters] == [theirs]
    assert found.bad_parameters[0].in_float64 == pytest.approx(0.01, rel=1e-3)
    assert not found.holds


def test_what_is_wrong_in_fp32_alone_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of which float64 knows nothing bad must still be as near to it as rounding is."""
    scaled(monkeypatch, "hc_head_base", 2.0, torch.float32)
    found = check_parity(fresh, (1, 5, 40))
    assert [p.name for p in found.bad_parameters] == ["model.hc_head.hc_base"]
    assert (found.bad_parameters[0].in_float64 or 0.0) < 1e-6


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="predict nothing"):
        check_parity(folder, [1, 1])
    with pytest.raises(ConfigError, match="longer than the model"):
        check_parity(folder, [10**9])
    assert main(["parity", str(folder), "--documents", "1;5"]) == 1
    assert main(["parity", str(tmp_path)]) == 1


def test_a_quantisation_that_only_the_config_speaks_of(folder: Path, tmp_path: Path) -> None:
    """transformers would look for scales that are not there; it is given weights and a config that fits."""
    claimed = Path(shutil.copytree(folder, tmp_path / "claimed"))
    values = json.loads((claimed / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (claimed / "config.json").write_text(json.dumps(values))
    found = check_parity(claimed, [5])
    assert found.holds
    assert found.decoded


@pytest.mark.parametrize("form", ["fp8", "fp4"])
def test_a_checkpoint_in_the_form_of_the_releases(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and backward hold on the quantised values, which are others than before; nothing stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with PublishedFolder(folder) as opened:
        write_checkpoint(FolderWeights(opened), opened.config, tmp_path / form, form, origin="")
    assert main(["parity", str(tmp_path / form), "--documents", "1,5,40"]) == 0
    told = capsys.readouterr().out
    assert "is quantised: transformers was given its values in FP32" in told
    assert "parity holds on 46 tokens" in told
    assert [path.name for path in tmp_path.iterdir()] == [form]
    quantised, plain = (check_parity(path, (40,)).loss[0] for path in (tmp_path / form, folder))
    assert quantised != plain
