"""The documented Python interface: load a folder, ask for logits, generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fullweight
from fullweight.checkpoint.hf import export_checkpoint
from fullweight.core.errors import FullweightError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny", initializer_range=0.2)), 0)
    return export_checkpoint(model, tmp_path_factory.mktemp("api") / "model", "float32")


def test_importing_the_package_imports_no_torch() -> None:
    """Planning and configuration run without it; so does the FLOP arithmetic."""
    code = (
        "import sys, fullweight, fullweight.core.config, fullweight.models.deepseek_v4.flops;"
        "from fullweight.models.deepseek_v4.config import DeepSeekV4Config;"
        "DeepSeekV4Config.preset('pro').num_parameters(mtp=True);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_gives_logits_of_each_document_alone(folder: Path) -> None:
    """A list of id lists in, a list of [length, vocabulary] fp32 tensors out, documents independent."""
    model = fullweight.load(folder)
    documents = [[1, 2, 3, 4, 5], [7], list(range(140))]
    logits = model.logits(documents)
    assert [tuple(x.shape) for x in logits] == [(5, 512), (1, 512), (140, 512)]
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in logits)
    for document, together in zip(documents, logits, strict=True):
        torch.testing.assert_close(model.logits([document])[0], together, rtol=0, atol=1e-4)
    torch.testing.assert_close(fullweight.load(str(folder)).logits(documents)[0], logits[0])


def test_loaded_weights_are_frozen_and_the_config_is_the_files(folder: Path) -> None:
    """Inference only: no parameter asks for a gradient; the config is the folder's."""
    model = fullweight.load(folder)
    assert isinstance(model, fullweight.LoadedModel)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert model.config == DeepSeekV4Config.from_file(folder / "config.json")
    assert model.config.num_parameters(mtp=True) == sum(p.numel() for p in model.model.parameters())


def test_bfloat16_computes_in_bfloat16(folder: Path) -> None:
    """dtype sets what activations are computed in: near the fp32 logits, not equal to them."""
    exact, narrow = (
        fullweight.load(folder, dtype=d).logits([list(range(60))])[0] for d in ("float32", "bfloat16")
    )
    assert narrow.dtype == torch.float32
    assert not torch.equal(exact, narrow)
    error = (exact - narrow).square().mean(-1).sqrt().median() / exact.square().mean().sqrt()
    assert error < 0.05


def test_generate_continues_each_prompt(folder: Path) -> None:
    """Greedy by default, only new ids, at most as many as asked, ended by the model's own stop token."""
    model = fullweight.load(folder)
    prompts = [[1, 2, 3], [4]]
    free = model.generate(prompts, max_new_tokens=6, stop_ids=[])
    assert [len(row) for row in free] == [6, 6]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model.logits([tokens])[0][-1].argmax()))
        expected.append(tokens[len(prompt) :])
    assert free == expected
    stop = free[0][2]
    stopping = fullweight.LoadedModel(model.model)
    stopping.model.config = model.config.model_copy(update={"eos_token_id": stop})
    assert stopping.generate([prompts[0]], max_new_tokens=6)[0] == free[0][: free[0].index(stop) + 1]
    one = model.generate(prompts, max_new_tokens=6, temperature=1.0, top_p=0.9, seed=5)
    assert one == model.generate(prompts, max_new_tokens=6, temperature=1.0, top_p=0.9, seed=5)


def test_user_mistakes_are_one_kind_of_error(folder: Path, tmp_path: Path) -> None:
    """A wrong folder, prompt, id or dtype: FullweightError, a ValueError too."""
    model = fullweight.load(folder)
    for mistake in (
        lambda: fullweight.load(tmp_path / "nowhere"),
        lambda: model.generate([[]]),
        lambda: model.logits([[512]]),
        lambda: fullweight.load(folder, dtype="fp16"),  # type: ignore[arg-type]
        lambda: fullweight.load(folder / "config.json"),
        lambda: model.logits([]),
        lambda: model.logits([[1], []]),
        lambda: model.logits([1, 2, 3]),  # type: ignore[list-item]
        lambda: model.logits(["ab"]),  # type: ignore[list-item]
        lambda: model.logits([[1.5]]),  # type: ignore[list-item]
        lambda: model.logits([[None]]),  # type: ignore[list-item]
        lambda: model.logits(3),  # type: ignore[arg-type]
        lambda: model.logits([[-1]]),
        lambda: model.logits([[2**70]]),
        lambda: model.generate([]),
        lambda: model.generate([[512]]),
        lambda: model.generate([["a"]]),  # type: ignore[list-item]
        lambda: model.generate([[1]], max_new_tokens=-1),
        lambda: model.generate([[1]], max_new_tokens=1.5),  # type: ignore[arg-type]
        lambda: model.generate([[1]], max_new_tokens=2**20),
        lambda: model.generate([[1]], temperature=-1.0),
        lambda: model.generate([[1]], temperature=float("nan")),
        lambda: model.generate([[1]], top_p=0.0),
        lambda: model.generate([[1]], top_p=float("nan")),
        lambda: model.generate([[1]], seed=-1),
        lambda: model.generate([[1]], seed=2**64),
    ):
        with pytest.raises(FullweightError):
            mistake()
    assert model.generate([torch.tensor([1, 2])], max_new_tokens=0) == [[]]  # type: ignore[list-item]
    assert issubclass(FullweightError, ValueError)


def test_an_unknown_attribute_is_named() -> None:
    """The package loads its interface lazily and still says what it lacks."""
    with pytest.raises(AttributeError, match="lode"):
        fullweight.lode  # noqa: B018
