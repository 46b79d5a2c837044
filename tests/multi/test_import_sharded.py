"""Several ranks import a quantised checkpoint straight into their shards: equal to one process, reading a part."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from fullweight.checkpoint.hf import load_model
from fullweight.checkpoint.published import totals
from fullweight.checkpoint.synthetic import write_synthetic
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

SCRIPT = """
    import hashlib, json, os, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from fullweight.checkpoint import hf
    from fullweight.checkpoint.shards import ShardReader
    from fullweight.models.deepseek_v4.config import DeepSeekV4Config
    from fullweight.models.deepseek_v4.model import DeepSeekV4
    from fullweight.parallel.fsdp import shard

    folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = DeepSeekV4(DeepSeekV4Config.from_file(folder))
    shard(model, [*model.layers, *model.mtp], init_device_mesh("cpu", (dist.get_world_size(),)))
    model.to_empty(device="cpu")
    read, original = 0, ShardReader._bytes
    def counted(self, start, count):
        global read
        read += count
        return original(self, start, count)
    ShardReader._bytes = counted
    hf.load_weights(model, folder)
    sharded = sum(isinstance(t, DTensor) for t in model.state_dict().values())
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    hashes = {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in whole.items()}
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, read)
    if dist.get_rank() == 0:
        with open(out, "w") as stream:
            json.dump({"hashes": hashes, "read": counts, "sharded": sharded}, stream)
    dist.barrier()
    os._exit(0)  # a thread of gloo that frees a tensor while the interpreter ends would abort the process
"""


def test_ranks_fill_their_shards(tmp_path: Path) -> None:
    """Built on meta, sharded by FSDP over 3 ranks (unevenly), filled in place.

    Every gathered tensor has one process's bytes, and no rank reads much more than its share.
    """
    ranks = 3
    config = DeepSeekV4Config.preset("tiny", hidden_size=96, moe_intermediate_size=160, n_routed_experts=8)
    folder = write_synthetic(config, tmp_path / "published")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [str(tmp_path / "script.py"), str(folder), str(tmp_path / "out.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    alone = load_model(folder).state_dict()
    hashes = {n: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for n, t in alone.items()}
    assert found["hashes"] == hashes
    assert found["sharded"] > len(hashes) * 3 // 4
    payload = totals(config).payload_bytes
    buffers = sum(t.numel() * t.element_size() for n, t in alone.items() if n.endswith(("tid2eid", "gate.bias")))
    assert max(found["read"]) < 1.25 * payload / ranks + buffers
