"""The operations of one pass on an NVIDIA GPU: `ops/cuda.py`, and `ops/reference.py` where it has none of its own.

The same names, and the same order of births and deaths as a rehearsal with `--ops cuda` shows, which traces the
formulas of `ops/fused.py` one operation after the other: the kernels that `torch.compile` makes of them hold less.
Most of the difference from a CPU's: Sinkhorn's rounds are kept; the indexer's loss keeps its targets spread over
all entries; scores of attention are there for 2**26 pairs at a time, in fp32 up to four times; the head's logits
are made again in backward, where its gradient, in fp32, is there three times while chunks are added up.

Left out: what does not grow with heads or width, and what kernels take for themselves. Imports no torch.
"""

from __future__ import annotations

from fullweight.models.deepseek_v4.config import CSA_RATIO, DeepSeekV4Config, LayerKind
from fullweight.planner.operations.base import FP32
from fullweight.planner.operations.cuda.attention import CudaAttention
from fullweight.planner.operations.cuda.experts import CudaExperts
from fullweight.planner.operations.cuda.hyper import CudaHyper
from fullweight.planner.operations.cuda.indexer import CudaIndexer


class CudaOperations(CudaExperts, CudaHyper, CudaAttention, CudaIndexer):
    """All of them; products and exchanges are those of every device."""

    @classmethod
    def kept_more(cls, config: DeepSeekV4Config, kind: LayerKind, row_tokens: int) -> int:
        """Targets and masks of the indexer's loss, over all entries of the row."""
        targets = row_tokens // CSA_RATIO * (FP32 + 1) if kind is LayerKind.CSA else 0
        return super().kept_more(config, kind, row_tokens) + targets
