"""The same architecture in transformers' `DeepseekV4ForCausalLM`, timed: the independent implementation.

Built from the same published config, in bf16 throughout (weights and gradients too), eager attention (the
only one it has), no cache. Forward with its own loss, backward; no optimizer step, no MTP, no indexer loss,
which transformers lacks: its step is the lighter one. It mixes up packed documents, so each runs alone. Its
hash table starts as zeros, which would send every token to one expert, so it is filled evenly.
"""

from __future__ import annotations

import time

import torch

from fullweight.bench.measure import BenchConfig, Measurement, peak_bytes, resident_bytes, timed_steps
from fullweight.core.errors import OperationError


def measure_transformers(config: BenchConfig, length: int) -> Measurement:
    """Run warm-up and timed forward-backward passes over `length` tokens.

    Raises OperationError when transformers is not installed.
    """
    try:
        import transformers  # noqa: PLC0415 - optional, and its memory belongs to this process alone
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM  # noqa: PLC0415
    except ImportError as error:
        raise OperationError(
            f"transformers with DeepSeek-V4 is needed for the comparison ({error}); install "
            "transformers==5.23.0 or give --transformers-up-to 0"
        ) from None
    baseline = resident_bytes()
    values = config.architecture().to_published(
        attn_implementation="eager", experts_implementation=config.transformers_experts, use_cache=False
    )
    other = DeepseekV4Config(**values)
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.bfloat16)
    model = DeepseekV4ForCausalLM(other).train()
    torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        table = getattr(layer.mlp.gate, "tid2eid", None)
        if table is not None:
            vocabulary, chosen = table.shape
            first = torch.arange(vocabulary).unsqueeze(1) * chosen
            table.copy_((first + torch.arange(chosen)) % other.n_routed_experts)
    documents = config.tokens(length).split(config.document_lengths(length))
    losses: dict[str, float] = {}

    def step() -> dict[str, float]:
        seconds, loss = {"forward": 0.0, "backward": 0.0}, 0.0
        for document in documents:
            start = time.perf_counter()
            output = model(input_ids=document[None], labels=document[None], use_cache=False)
            between = time.perf_counter()
            (output.loss * (len(document) / length)).backward()
            seconds["forward"] += between - start
            seconds["backward"] += time.perf_counter() - between
            loss += output.loss.item() * len(document) / length
        model.zero_grad(set_to_none=True)
        losses["lm"] = loss
        return seconds

    steps, waiting = timed_steps(config, step)
    notes = {"transformers": transformers.__version__, "experts": config.transformers_experts}
    return Measurement(steps, baseline, peak_bytes(), waiting.share(), losses, notes)
