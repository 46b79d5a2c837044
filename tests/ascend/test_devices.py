"""The contract's Ascend against the real torch_npu: its names, and every call on a stand-in for CANN.

What is answered here is torch_npu's own bookkeeping. That a die answers the same is for `make test-device` on one.
"""

from __future__ import annotations

import ast
import inspect
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ascend.cann import CHIP, DIES

from fullweight.core.errors import ConfigError
from fullweight.devices import absent, ascend, find, of, separate
from fullweight.devices.ascend import Ascend


def chains(source: str) -> set[str]:
    """Attributes read of torch_npu's `npu` and, by way of it, of `mstx`: "set_device", "mstx.range_start"."""
    roots = {"self._npu": "", "npu": "", "torch_npu().npu": "", "mstx": "mstx."}
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (root := ast.unparse(node.value)) in roots:
            found.add(roots[root] + node.attr)
    return found


def test_every_name_that_is_used_exists() -> None:
    """In the package itself, not in our idea of it."""
    import torch_npu

    names = chains(inspect.getsource(ascend))
    assert {"set_device", "mem_get_info", "get_rng_state", "mstx", "mstx.range_start"} <= names
    for name in names:
        found: Any = torch_npu.npu
        for part in name.split("."):
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_it_is_found_and_counts_dies() -> None:
    """Before CUDA and the CPU; a node of eight 910C chips."""
    device = find("auto")
    assert device is find("ascend")
    assert "ascend" not in absent()
    assert device.count() == DIES
    assert device.chip() == CHIP
    topology = device.topology()
    assert (topology.num_devices, topology.devices_per_chip) == (DIES, 2)
    assert topology.memory_bytes == 64 << 30
    assert (topology.links, device.watts()) == (None, None), "no npu-smi here: unknown"


def test_a_rank_gets_its_die() -> None:
    """By its local rank, made current; the seventeenth rank of a node has none."""
    device = find("ascend")
    for local_rank in (3, 0):
        place = device.device(local_rank)
        assert place == torch.device("npu", local_rank)
        assert torch.accelerator.current_device_index() == local_rank
        assert of(place) is device
        assert separate(place)
    with pytest.raises(ConfigError, match="sees 16 NPU"):
        device.device(DIES)


def test_every_call_is_taken() -> None:
    """Memory, peak, waiting, ranges: with the arguments that torch_npu has."""
    device = find("ascend")
    device.device(0)
    device.synchronize()
    device.reset_peak()
    use = device.memory()
    assert (use.allocated, use.free, use.total) == (0, 64 << 30, 64 << 30)
    with device.range("step"):
        pass


def test_the_generator_takes_its_own_state_back() -> None:
    """Bytes on the host, as a checkpoint keeps them."""
    device = find("ascend")
    device.device(0)
    torch.manual_seed(7)
    state = device.rng_state()
    torch.manual_seed(8)
    assert not torch.equal(device.rng_state(), state)
    device.set_rng_state(state)
    assert torch.equal(device.rng_state(), state)
    assert (state.dtype, state.device.type) == (torch.uint8, "cpu")


def test_its_backend_is_registered() -> None:
    """torch knows hccl for npu tensors once the package is there, and gloo for those of the host."""
    Ascend().backend()
    parts = dict(part.split(":") for part in find("ascend").backend().split(","))
    assert parts == {"cpu": "gloo", "npu": "hccl"}
    assert dist.Backend.default_device_backend_map["npu"] == "hccl"
    assert set(parts.values()) <= set(dist.Backend.backend_list)


def test_the_guard_against_the_cpu_is_torch_npus() -> None:
    """The variable that is set before torch is imported is one that the library reads."""
    import torch_npu

    library = os.path.join(os.path.dirname(torch_npu.__file__), "lib", "libtorch_npu.so")
    with open(library, "rb") as stream:
        assert ascend.FALLBACK.encode() in stream.read()
    assert os.environ[ascend.FALLBACK] == "1"
