"""Parts of published tensors: what each rank reads, and the memory that reading and writing take."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fullweight.checkpoint import hf
from fullweight.checkpoint.published import LAYOUTS, totals
from fullweight.checkpoint.shards import ShardReader
from fullweight.models.deepseek_v4.config import DeepSeekV4Config


@pytest.mark.parametrize("layout", ["fp4", "base"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_slices_are_the_whole_and_read_no_more(
    published: Callable[[str], Path], layout: str, dim: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank's part equals that part of the whole; together they read little more than the files hold."""
    folder = published(layout)
    whole = hf.load_model(folder).state_dict()
    counts = [0]
    original = ShardReader._bytes

    def counted(self: ShardReader, start: int, count: int) -> Tensor:
        counts[-1] += count
        return original(self, start, count)

    monkeypatch.setattr(ShardReader, "_bytes", counted)
    for rank in range(ranks):
        counts.append(0)
        slices = {}
        for name, tensor in whole.items():
            cut = min(dim, tensor.dim() - 1)
            size = -(-tensor.shape[cut] // ranks)
            part = tensor.split(size, cut)[rank] if rank < len(tensor.split(size, cut)) else tensor[:0]
            offset = [0] * tensor.dim()
            offset[cut] = rank * size if part.numel() else 0
            slices[name] = hf.Slice(torch.full_like(part, 7), tuple(offset), tuple(tensor.shape))
        hf.load_slices(slices, folder)
        for name, target in slices.items():
            cut = min(dim, whole[name].dim() - 1)
            start = target.offset[cut]
            expected = whole[name].narrow(cut, start, target.tensor.shape[cut])
            if target.tensor.numel():
                assert torch.equal(target.tensor, expected), name
    payload = totals(DeepSeekV4Config.from_file(folder), LAYOUTS[layout]).payload_bytes
    if dim == 0:  # rows: only scales of FP8 blocks that two ranks share are read twice
        assert sum(counts) < 1.02 * payload
        assert max(counts) < 1.3 * payload / ranks
    columns = {"layers.0.attn.wq_a.weight": hf.Slice(torch.zeros(40, 30), (0, 100), (40, 144))}
    hf.load_slices(columns, folder)
    found = columns["layers.0.attn.wq_a.weight"].tensor
    assert torch.equal(found, whole["layers.0.attn.wq_a.weight"][:, 100:130])


def test_peak_memory_is_two_largest_tensors_beyond_the_target(tmp_path: Path) -> None:
    """Import and export of a model whose embedding and head dwarf the rest, in a fresh process (VmHWM)."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's peak of resident memory")
    largest = 98304 * 512 * 2
    script = f"""
        import torch
        from pathlib import Path
        from fullweight.checkpoint import hf
        from fullweight.checkpoint.source import SourceForm
        from fullweight.checkpoint.synthetic import write_synthetic
        from fullweight.models.deepseek_v4.config import DeepSeekV4Config
        from fullweight.models.deepseek_v4.model import DeepSeekV4
        torch.set_num_threads(1)

        def status(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

        config = DeepSeekV4Config.preset("tiny", vocab_size=98304, hidden_size=512, num_hash_layers=0)
        folder = write_synthetic(config, {str(tmp_path / "m")!r})
        small = DeepSeekV4Config.preset("tiny")
        hf.load_model(write_synthetic(small, {str(tmp_path / "s")!r}))  # libraries and kernels are in
        model = DeepSeekV4(config)
        for tensor in model.state_dict().values():
            tensor.fill_(1)

        def extra(work):
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            work()
            return status("VmHWM") - before

        source = SourceForm.of(folder)
        print(extra(lambda: hf.load_weights(model, folder)))
        print(extra(lambda: hf.export_checkpoint(model, {str(tmp_path / "o")!r}, "source", source=source)))
    """
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    for extra in map(int, done.stdout.split()):
        assert extra <= 2 * largest, f"{extra:,} bytes beyond the target, largest tensor {largest:,}"
