"""A whole model on the Ascend operations, emulated in float64: losses and every gradient are the reference's.

Recipes and recomputation run operations again in backward; what they keep is seen here and not in tests of one
operation. One document is long enough for an entry of every ratio, the others are not.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from tests.ascend.emulated import install

from fullweight.core.types import Batch, PackedLayout
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import initialise
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops.ascend import AscendOperations
from fullweight.ops.reference import ReferenceOperations

# float64 rounds at 1e-16; a model is some hundred operations deep, and gradients are differences of larger ones
TIGHT = 1e-9


def passed(
    operations: ReferenceOperations, policy: Literal["none", "selective", "full"]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    config = DeepSeekV4Config.preset("tiny")
    model = DeepSeekV4(config, torch.float64, ops=operations, indexer_loss="selected")
    model = initialise(model, 3).double()
    model.set_recompute(policy)
    layout = PackedLayout.build([131, 9, 14], config.ratios, 160)
    tokens = torch.arange(160) * 7 % config.vocab_size
    losses = model(Batch(tokens, torch.ones(160), layout)).losses
    sum(losses.values(), torch.zeros((), dtype=torch.float64)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("hyper", [False, True])
def test_a_model_learns_the_same(policy: Literal["none", "full"], hyper: bool) -> None:
    install()
    expected_losses, expected = passed(ReferenceOperations(), "none")
    losses, found = passed(AscendOperations(hyper_connection=hyper, limits=False), policy)
    for name, loss in expected_losses.items():
        assert abs(losses[name].item() / loss.item() - 1) < TIGHT, name
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error < TIGHT, f"{name}: {error:.2e}"
