"""The whole model on whichever device is there, against float64 on the host: losses and every gradient."""

from __future__ import annotations

import pytest
import torch
from tests.unit.models.cases import draw_documents, make_batch, randomise
from torch import Tensor

from fullweight.devices import Device
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import resolve_operations
from fullweight.ops.reference import Workload

LENGTHS = (1, 3, 5, 131, 20)


def total(model: DeepSeekV4, documents: list[list[int]], place: torch.device) -> tuple[dict[str, float], Tensor]:
    """Every loss by name, and their sum to differentiate; 20 places of the row are padding."""
    losses = model(make_batch(documents, model.config, sum(LENGTHS) + 20).to(place)).losses
    return {name: loss.item() for name, loss in losses.items()}, torch.stack([*losses.values()]).sum()


@pytest.mark.parametrize("ops", ["reference", "auto"])
def test_losses_and_gradients_are_those_of_float64(device: Device, ops: str) -> None:
    """fp32 rounding is about 1e-6 of a loss and 1e-5 of a gradient; operations that the device lacks raise."""
    place = device.device(0)
    config = DeepSeekV4Config.preset("tiny", vocab_size=40, index_topk=4, compress_ratios=[4, 0, 128, 4, 0])
    index = (config.index_n_heads, config.index_head_dim, config.index_topk)
    workload = Workload(torch.float32, config.num_attention_heads, config.head_dim, *index)
    model = DeepSeekV4(config, torch.float32, ops=resolve_operations(ops, device.type, None, workload))
    with torch.no_grad():
        randomise(model, 0)
    exact = DeepSeekV4(config, torch.float64, ops="reference").double()
    exact.load_state_dict(model.state_dict())
    documents = draw_documents(model, LENGTHS, 0)
    model.to(place)
    expected, summed = total(exact, documents, torch.device("cpu"))
    summed.backward()
    found, summed = total(model, documents, place)
    summed.backward()
    assert set(expected) >= {"lm", "mtp", "indexer", "balance"}
    assert found == pytest.approx(expected, rel=2e-5)
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    for name, parameter in model.named_parameters():
        right = gradients[name]
        assert parameter.grad is not None, name
        assert right is not None, name
        error = float((parameter.grad.cpu() - right).norm())
        assert error <= 2e-4 * float(right.norm()) + 1e-6, name
