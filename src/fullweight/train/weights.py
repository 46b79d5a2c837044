"""The model of a run and its first weights, never whole in one place unless one rank is all there is.

The model is built without storage, sharded, given storage for this rank's part, and filled: from the recipe's
checkpoint, of which each rank reads the rows that it holds, or with fresh values, of which each keeps its own.
A run that is resumed fills its model from its own checkpoint instead. Beyond the shards this takes a few chunks of
rows, less than two of the largest tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from fullweight.checkpoint import hf
from fullweight.checkpoint.gather import whole_tensors
from fullweight.checkpoint.imported import keep_form, load_receipt
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.receipt import Receipt
from fullweight.checkpoint.slices import Slice
from fullweight.core.errors import ConfigError
from fullweight.devices import of
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import fill_part
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import resolve_operations
from fullweight.ops.reference import Workload
from fullweight.parallel.fsdp import gathered
from fullweight.parallel.mesh import Ranks
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder
from fullweight.train.trainable import freeze


def workload_of(config: RunConfig, architecture: DeepSeekV4Config, tensor: int = 1) -> Workload:
    """What a rank's operations work on, with attention's heads shared by `tensor` ranks."""
    return Workload(
        config.train.compute_dtype,
        architecture.num_attention_heads // tensor,
        architecture.head_dim,
        architecture.index_n_heads,
        architecture.index_head_dim,
        architecture.index_topk,
    )


def empty_model(config: RunConfig, architecture: DeepSeekV4Config, device: str) -> DeepSeekV4:
    """The model without storage (on the meta device), with the operations of `device`.

    What the recipe freezes takes no gradient.
    """
    workload = workload_of(config, architecture, config.parallel.tensor)
    ops = resolve_operations(config.ops.default, device, config.ops.chosen, workload)
    with torch.device("meta"):
        model = DeepSeekV4(
            architecture, config.train.compute_dtype, ops=ops, indexer_loss=config.train.indexer_loss
        )
    if config.train.compute_dtype == torch.float64:
        model.double()
    model.dense_csa = config.train.csa_attention == "visible"
    chosen = config.train.trained_names(architecture)
    if chosen is not None:
        freeze(model, chosen)
    return model


def fill(model: DeepSeekV4, config: RunConfig) -> Receipt | None:
    """The recipe's first weights into this rank's part of a model that has storage; all ranks together.

    Returns the receipt of a checkpoint's weights, None when they are fresh. Raises CheckpointError, on every rank,
    naming what is wrong with a checkpoint.
    """
    if (folder := config.model.checkpoint) is not None:
        peers = Peers()
        parts = peers.together(lambda: hf.load_weights(model, folder, hashing=True))
        return peers.on_main(lambda: load_receipt(folder, parts))
    for name, tensor in model.state_dict().items():
        held = Slice.of(tensor)
        fill_part(name, held.tensor, held.offset, held.shape, model.config, config.train.seed)
    return None


@contextmanager
def readable(model: DeepSeekV4, config: RunConfig, ranks: Ranks) -> Iterator[DeepSeekV4 | None]:
    """A whole model to generate with, on the ranks that can have one; all ranks enter and leave together.

    Where parameters are cut for storage alone every rank gathers them. Where ranks compute together (experts,
    pipeline, slices of a row) generating in step would need all of them at every token: rank 0 has a copy instead,
    and the others wait.
    """
    if ranks.layout.plain:
        with gathered(model):
            yield model
        return
    copy = None
    if ranks.is_main:
        copy = empty_model(config, model.config, ranks.device.type).to_empty(device=ranks.device)
    targets = {} if copy is None else copy.state_dict()
    tensors = {n: t for n, t in get_model_state_dict(model).items() if isinstance(t, Tensor)}
    whole_tensors(tensors, Peers(), lambda name, tensor: targets[name].copy_(tensor))
    with torch.no_grad():
        yield copy


def check_room_for_copy(model: DeepSeekV4, ranks: Ranks) -> None:
    """Raise ConfigError, on every rank, when rank 0 could not hold the copy that `readable` would make there."""
    needed = model.config.num_parameters(mtp=bool(model.config.num_nextn_predict_layers)) * 4
    free = ranks.broadcast(of(ranks.device).memory().free if ranks.is_main else 0)
    if not ranks.layout.plain and needed > free:
        axes = " x ".join(f"{name} {size}" for name, size in ranks.layout.axes().items())
        raise ConfigError(
            f"answers to held-out questions are generated by rank 0 with a copy of the whole model where ranks "
            f"compute together ({axes}): {needed / 1e9:,.1f} GB, and it has {free / 1e9:,.1f} GB free; set "
            "eval.num_samples=0"
        )


def keep_origin(receipt: Receipt | None, folder: RunFolder) -> None:
    """Leave the receipt of a checkpoint's weights and their form in the run's folder; rank 0 alone."""
    if receipt is not None:
        keep_form(Path(receipt.origin), folder.source)
        receipt.write(folder.imported)
