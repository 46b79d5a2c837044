"""The model as a module: sizes, names, roles, dtypes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fullweight.core.errors import ConfigError, DataError, OperationError
from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4.config import PRESETS, DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4

from .cases import draw_documents, make_batch, randomise

# (without MTP, with MTP) of the two released models; their buffers are the router biases and hash tables.
PUBLISHED = {
    "flash": (284_332_230_231, 290_942_278_866, 2_337_280),
    "pro": (1_572_997_179_491, 1_598_837_325_086, 2_349_312),
}


def _count(config: DeepSeekV4Config) -> tuple[int, int]:
    with torch.device("meta"):
        model = DeepSeekV4(config, ops="reference")
    return sum(p.numel() for p in model.parameters()), sum(
        b.numel() for n, b in model.named_buffers() if not n.startswith("mtp")
    )


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_released_sizes_are_exact(name: str) -> None:
    """Counted tensor by tensor on the meta device, with and without the MTP block."""
    without, with_mtp, buffers = PUBLISHED[name]
    assert _count(DeepSeekV4Config.preset(name)) == (with_mtp, buffers)
    assert _count(DeepSeekV4Config.preset(name, num_nextn_predict_layers=0)) == (without, buffers)


@pytest.mark.parametrize("name", list(PRESETS))
def test_closed_form_equals_the_module(name: str) -> None:
    """`num_parameters` of the config equals the module built from it."""
    config = DeepSeekV4Config.preset(name)
    assert _count(config)[0] == config.num_parameters(mtp=True)
    without = DeepSeekV4Config.preset(name, num_nextn_predict_layers=0)
    assert _count(without)[0] == config.num_parameters(mtp=False)


def test_parameters_are_float32_whatever_is_computed_in() -> None:
    """Masters stay fp32 under bf16 compute, and so do their gradients."""
    model = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny"), torch.bfloat16), 0)
    output = model(make_batch([list(range(150))], model.config))
    sum(output.losses.values(), torch.zeros(())).backward()
    assert {v.dtype for v in output.losses.values()} == {torch.float32}
    assert output.log_probs.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


def test_roles_partition_every_parameter() -> None:
    """Every parameter has a role, and a Muon parameter divides into its matrices."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"))
    roles = model.parameter_roles()
    named = dict(model.named_parameters())
    assert roles.keys() == named.keys()
    for name, role in roles.items():
        parameter = named[name]
        assert role.optimizer in ("muon", "adamw")
        if role.optimizer == "muon":
            assert parameter.dim() >= 2, name
            assert parameter.numel() % (role.num_matrices * parameter.shape[-1]) == 0, name
    adamw = {
        n.split(".")[-2] + "." + n.split(".")[-1]
        for n, r in roles.items()
        if r.optimizer == "adamw" and n.endswith("weight") and "norm" not in n
    }
    assert adamw == {"embed.weight", "head.weight"}
    assert roles["layers.1.ffn.experts.gate_up"].num_matrices == 16
    assert roles["layers.1.attn.wo_a.weight"].num_matrices == 2


def test_without_mtp_there_is_no_mtp() -> None:
    """num_nextn_predict_layers = 0: no parameters, no loss, and the language loss is unchanged."""
    config = DeepSeekV4Config.preset("tiny")
    model = initialise(DeepSeekV4(config), 3)
    bare = initialise(DeepSeekV4(DeepSeekV4Config.preset("tiny", num_nextn_predict_layers=0)), 3)
    assert not [n for n, _ in bare.named_parameters() if "mtp" in n]
    batch = make_batch([list(range(30))], config)
    one, two = model(batch), bare(batch)
    assert "mtp" not in two.losses
    assert len(two.expert_counts) == len(one.expert_counts) - 1
    assert two.losses["lm"].item() == one.losses["lm"].item()


def test_logits_do_not_depend_on_later_tokens() -> None:
    """Causality, at every boundary: changing token t leaves all logits before t bit for bit or to rounding."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny", vocab_size=40, index_n_heads=32))
    randomise(model, 1)
    (document,) = draw_documents(model, (140,), 2)
    before = model.logits([document])[0]
    for t in (1, 3, 4, 7, 8, 16, 127, 128, 139):
        changed = list(document)
        changed[t] = (changed[t] + 1) % 40
        after = model.logits([changed])[0]
        torch.testing.assert_close(after[:t], before[:t], rtol=0, atol=1e-5)
        assert not torch.allclose(after[t], before[t])


def test_forward_is_repeatable() -> None:
    """The same row twice gives the same bits, losses and gradients."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"), torch.bfloat16)
    initialise(model, 0)
    batch = make_batch([list(range(100)), list(range(40))], model.config, 160)
    results = []
    for _ in range(2):
        model.zero_grad()
        losses = model(batch).losses
        sum(losses.values(), torch.zeros(())).backward()
        results.append([*losses.values(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "empty"), ([[1], []], "empty"), ([[1, 512]], "512 is outside.*512"), ([[-3]], "-3 is outside")],
)
def test_bad_documents_are_refused(documents: list[list[int]], message: str) -> None:
    """Empty documents and ids outside the vocabulary: one message that says which."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"))
    with pytest.raises(DataError, match=message):
        model.logits(documents)


def test_a_layout_without_the_models_tables_is_refused() -> None:
    """A row packed for another architecture is named as such instead of failing inside a layer."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"))
    batch = Batch(torch.arange(8), torch.ones(8), PackedLayout.build([8], [4]))
    with pytest.raises(ConfigError, match="128"):
        model(batch)


def test_absent_operations_are_refused() -> None:
    """Asking for a set of operations that is not here raises and names the nearest."""
    with pytest.raises(OperationError, match="reference"):
        DeepSeekV4(DeepSeekV4Config.preset("tiny"), ops="referense")
