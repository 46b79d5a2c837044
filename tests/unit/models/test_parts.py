"""Parts of a model, run one behind the other, are the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.model import DeepSeekV4, ModelOutput
from fullweight.models.deepseek_v4.parts import parts_of

from .cases import draw_documents, make_batch, randomise


@pytest.mark.parametrize("cuts", [(2, 2), (1, 2, 1), (1, 1, 1, 1)])
def test_parts_give_the_losses_and_gradients_of_the_whole(cuts: tuple[int, ...]) -> None:
    """Each part holds its own blocks only and is run on copies of what the part before it hands over."""
    whole = DeepSeekV4(DeepSeekV4Config.preset("tiny"))
    randomise(whole, 1)
    batch = make_batch(draw_documents(whole, (5, 150, 60), 2), whole.config, 224)
    expected = whole(batch)
    torch.stack(list(expected.losses.values())).sum().backward()

    parts = parts_of(cuts)
    models = []
    for part in parts:
        model = DeepSeekV4(whole.config)
        model.keep([part])
        own = {name: tensor for name, tensor in whole.state_dict().items() if name in model.state_dict()}
        model.load_state_dict(own)
        models.append(model)
    names = [name for model in models for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(dict(whole.named_parameters())), "every parameter is held once, under its name"

    outputs: list[ModelOutput] = []
    received: list[tuple[Tensor, ...]] = [()]
    for model, part in zip(models, parts, strict=True):
        outputs.append(model(batch, part=part, received=received[-1]))
        handed_on = () if part.is_last else (*outputs[-1].payload, *received[-1][len(outputs[-1].payload) :])
        received.append(tuple(t.detach().requires_grad_() for t in handed_on))
    for output, before, after in list(zip(outputs, received, received[1:], strict=False))[::-1]:
        losses = [value for value in output.losses.values() if value.requires_grad]  # a part may have none
        handed_on = (*output.payload, *before[len(output.payload) :]) if after else ()
        torch.autograd.backward((*losses, *handed_on), (*(None for _ in losses), *(t.grad for t in after)))

    for name, value in expected.losses.items():
        found = torch.stack([o.losses[name] for o in outputs if name in o.losses]).sum()
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    assert torch.equal(outputs[-1].log_probs, expected.log_probs)
    assert torch.equal(torch.cat([o.expert_counts for o in outputs]), expected.expert_counts)
    gradients = {name: p.grad for model in models for name, p in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        # the same sums; only the embedding's gradient adds up its two sources in another order
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_payload_has_the_shapes_that_were_said() -> None:
    """What a part hands over is known before it runs."""
    model = DeepSeekV4(DeepSeekV4Config.preset("tiny"), torch.bfloat16)
    randomise(model, 1)
    batch = make_batch([[1, 2, 3, 4, 5]], model.config)
    output = model(batch, part=parts_of([3, 1])[0])
    assert tuple(tuple(t.shape) for t in output.payload) == model.payload_shapes(batch.num_tokens)
    assert {t.dtype for t in output.payload} == {torch.bfloat16}


def test_a_part_moves_the_biases_of_its_own_routers() -> None:
    """Counts come for all layers; a part takes the rows of the layers that it holds."""
    config = DeepSeekV4Config.preset("tiny")
    counts = torch.arange(5 * 8).view(5, 8)
    whole, part = DeepSeekV4(config), DeepSeekV4(config)
    randomise(whole, 1)
    part.keep([parts_of([1, 2, 1])[1]])
    part.load_state_dict({n: t for n, t in whole.state_dict().items() if n in part.state_dict()})
    before = whole.layers[2].ffn.gate.bias.clone()
    whole.update_router_bias(counts, 0.1)
    part.update_router_bias(counts, 0.1)
    assert not torch.equal(whole.layers[2].ffn.gate.bias, before)
    for layer in (1, 2):
        assert torch.equal(part.layers[layer].ffn.gate.bias, whole.layers[layer].ffn.gate.bias)
