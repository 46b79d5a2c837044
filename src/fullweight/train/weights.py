"""The model of a run and its first weights, never whole in one place unless one rank is all there is.

The model is built without storage, sharded, given storage for this rank's part, and filled: from the recipe's
checkpoint, of which each rank reads the rows that it holds, or with fresh values, of which each keeps its own.
A run that is resumed fills its model from its own checkpoint instead. Beyond the shards this takes a few chunks of
rows, less than two of the largest tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fullweight.checkpoint import hf
from fullweight.checkpoint.imported import keep_form, load_receipt
from fullweight.checkpoint.peers import Peers
from fullweight.checkpoint.receipt import Receipt
from fullweight.checkpoint.slices import Slice
from fullweight.models.deepseek_v4.config import DeepSeekV4Config
from fullweight.models.deepseek_v4.init import fill_part
from fullweight.models.deepseek_v4.model import DeepSeekV4
from fullweight.ops import resolve_operations
from fullweight.train.config import RunConfig
from fullweight.train.run_folder import RunFolder
from fullweight.train.trainable import freeze


def empty_model(config: RunConfig, architecture: DeepSeekV4Config, device: str) -> DeepSeekV4:
    """The model without storage (on the meta device), with the operations of `device`.

    What the recipe freezes takes no gradient.
    """
    ops = resolve_operations(config.train.ops, device)
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


def keep_origin(receipt: Receipt | None, folder: RunFolder) -> None:
    """Leave the receipt of a checkpoint's weights and their form in the run's folder; rank 0 alone."""
    if receipt is not None:
        keep_form(Path(receipt.origin), folder.source)
        receipt.write(folder.imported)
