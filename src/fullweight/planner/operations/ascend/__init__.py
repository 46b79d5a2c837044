"""The operations of one pass on an Ascend die: `ops/ascend`, and `ops/reference.py` where it has no operator.

The same names, and the same order of births and deaths as a rehearsal with `--device npu --ops ascend` shows. Most
of the difference from a CPU's: hyper-connections are plain torch, whose autograd keeps the streams in fp32, twice
for each sublayer's input and once for its output; attention keeps its output before and after it is rotated back,
and its gradient has it in fp32; a chunk of the head's logits is there in fp32 three times.

Left out: what does not grow with heads or width (tables of a rotation, signs), and what the operators take for
themselves. Hyper-connections by torch_npu, which a recipe may ask for, are not here. Imports no torch.
"""

from __future__ import annotations

from fullweight.models.deepseek_v4.config import DeepSeekV4Config, LayerKind
from fullweight.planner.operations.ascend.attention import AscendAttention
from fullweight.planner.operations.ascend.experts import AscendExperts
from fullweight.planner.operations.ascend.indexer import AscendIndexer
from fullweight.planner.operations.base import BF16, FP32


class AscendOperations(AscendExperts, AscendAttention, AscendIndexer):
    """All of them; products and exchanges are those of every device."""

    @classmethod
    def kept_more(cls, config: DeepSeekV4Config, kind: LayerKind, row_tokens: int) -> int:
        """The streams in fp32, thrice for each sublayer, and attention's output before it is rotated back too."""
        n, d = config.hc_mult, config.hidden_size
        wide = 2 * (3 * n * d + d) * FP32 + config.num_attention_heads * config.head_dim * BF16
        return super().kept_more(config, kind, row_tokens) + wide
