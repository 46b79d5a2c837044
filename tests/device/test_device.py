"""What `devices/base.py` promises, on whichever devices this machine has. Not one line knows which."""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.device.conftest import PRESENT
from tests.processes import ROOT, fullweight

from fullweight.devices import DEVICES, Device, find, of, separate
from fullweight.evidence.ledger import read
from fullweight.parallel.deterministic import deterministic

MIB = 1 << 20
LARGE = 512 * MIB


def test_memory_rises_and_falls_with_a_tensor(device: Device) -> None:
    """Allocated bytes follow, the peak stays, and what is free is no more than there is.

    Half the tensor is asked for: a process's resident memory moves by other things too, and its peak, which the
    kernel brings up to date now and then, lags by some pages. The tensor lies in pages of its own, which a CPU
    gives back: those of torch's own tensors stay with the process (docs/speed.md, "Memory").
    """
    place = device.device(0)
    device.reset_peak()
    before = device.memory()
    tensor = torch.frombuffer(mmap.mmap(-1, LARGE), dtype=torch.float32).fill_(1.0).to(place)
    device.synchronize()
    held = device.memory()
    del tensor
    device.synchronize()
    after = device.memory()
    assert held.allocated - before.allocated > LARGE // 2
    assert held.allocated - after.allocated > LARGE // 2
    assert after.peak - after.allocated > LARGE // 2
    assert all(0 <= use.free <= use.total and use.allocated <= use.reserved for use in (before, held, after))


def test_the_peak_can_be_begun_anew(device: Device) -> None:
    """An earlier, larger allocation is forgotten; at the least, what is allocated now counts."""
    place = device.device(0)
    torch.ones(LARGE // 4, device=place)
    device.synchronize()
    before = device.memory().peak
    device.reset_peak()
    after = device.memory()
    assert after.allocated <= after.peak <= before + LARGE // 2
    if separate(place):
        assert before - after.peak > LARGE // 2


def test_a_generator_goes_on_from_its_state(device: Device) -> None:
    """The same draws again from a state that was taken, and others after them."""
    place = device.device(0)
    state = device.rng_state()
    first = torch.randn(1000, device=place)
    second = torch.randn(1000, device=place)
    device.set_rng_state(state)
    assert state.dtype == torch.uint8
    assert state.device.type == "cpu"
    assert torch.equal(torch.randn(1000, device=place), first)
    assert torch.equal(torch.randn(1000, device=place), second)
    assert not torch.equal(first, second)


def test_deterministic_mode_repeats_a_scattered_sum(device: Device) -> None:
    """A sum into few places, whose order is open otherwise, gives equal bits; the mode ends with its block."""
    place = device.device(0)
    values = torch.randn(200_000, device=place)
    places = torch.randint(7, (200_000,), device=place)
    with deterministic(True, device):
        assert torch.are_deterministic_algorithms_enabled()
        sums = [torch.zeros(7, device=place).index_add_(0, places, values) for _ in range(5)]
        assert all(torch.equal(sums[0], other) for other in sums[1:])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_range_runs_what_is_in_it_and_lets_errors_through(device: Device) -> None:
    """With no profiler attached it costs nothing and hides nothing."""
    with device.range("doubling"):
        doubled = torch.ones(4, device=device.device(0)) * 2
    assert doubled.sum().item() == 8

    def fail() -> None:
        with device.range("failing"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_work_is_done_after_waiting(device: Device) -> None:
    """A copy that need not be waited for has arrived after `synchronize`."""
    source = torch.randn(1000, 1000)
    target = torch.empty(1000, 1000, pin_memory=separate(device.device(0)))
    target.copy_(source.to(device.device(0)), non_blocking=True)
    device.synchronize()
    assert torch.equal(target, source)


def test_a_group_of_one_reduces_on_host_and_device(device: Device) -> None:
    """The backend takes tensors of both, in process groups and subgroups."""
    place = device.device(0)
    dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1)
    try:
        for where in (torch.device("cpu"), place):
            values = torch.arange(4.0, device=where)
            dist.all_reduce(values)
            assert values.tolist() == [0, 1, 2, 3]
            gathered = torch.empty(4, device=where)
            dist.all_gather_single(gathered, values, group=dist.new_group([0]))
            assert torch.equal(gathered, values)
        device.synchronize()
    finally:
        dist.destroy_process_group()


def test_each_rank_of_a_machine_has_its_own(device: Device) -> None:
    """By its local rank, and made current; more ranks than devices are refused where devices are not shared."""
    for local_rank in range(device.count()):
        place = device.device(local_rank)
        assert (place.type, place.index or 0) == (device.type, local_rank if separate(place) else 0)
        assert torch.empty(1, device=device.type).device.index == place.index
        assert of(place) is device
    place = device.device(0)
    if separate(place):
        with pytest.raises(ValueError, match="LOCAL_RANK"):
            device.device(device.count())
    else:
        assert device.device(device.count()) == place


def test_it_says_what_it_is(device: Device) -> None:
    """Chip, topology and power; what is unknown is None, and power is that of a machine that is on."""
    topology, watts = device.topology(), device.watts()
    assert device.chip()
    assert topology.num_devices == device.count() > 0
    assert topology.memory_bytes == device.memory().total
    assert topology.links is None or len(topology.links) == device.count()
    assert watts is None or watts > 0


def test_a_meter_tells_power_where_the_device_does(device: Device) -> None:
    """Over a stretch of time, without waiting for it; unknown exactly where the device's own figure is."""
    known, meter, last = device.watts() is not None, device.power_meter(), time.monotonic() + 120
    try:
        meter.begin()
        while (watts := meter.watts()) is None and known:
            assert time.monotonic() < last, "no reading in two minutes"
            time.sleep(0.05)
        assert (watts is not None and watts > 0) if known else watts is None
    finally:
        meter.close()


def test_auto_takes_the_first_that_can_be_used() -> None:
    """In the table's order; what cannot be used is refused by name, with a reason."""
    usable = [name for name, kind in DEVICES.items() if kind.available() is None]
    assert find("auto").name == usable[0] == PRESENT[0]
    for name, kind in DEVICES.items():
        if name in usable:
            assert find(name).name == name
        else:
            with pytest.raises(ValueError, match=name) as caught:
                find(name)
            assert str(kind.available()) in str(caught.value)


@pytest.mark.parametrize("name", PRESENT)
def test_a_run_trains_on_it_and_says_so(name: str, tmp_path: Path) -> None:
    """Two steps of the smoke recipe in deterministic mode; device and operations are printed and recorded."""
    run = tmp_path / "run"
    overrides = [f"train.device={name}", "train.num_steps=2", "eval.num_samples=0", "parallel.deterministic=true"]
    settings = [part for override in overrides for part in ("--set", override)]
    ended = fullweight("train", ROOT / "recipes" / "tiny_smoke.toml", "--output", run, *settings)
    assert ended.ok, ended.output
    assert f"device: {name} ({find(name).chip()})" in ended.output
    lines = list(read(run / "ledger.jsonl"))
    assert [line["device"]["name"] for line in lines if line.get("what") == "start"] == [name]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 2
    assert all(step["memory"].get("device_peak_bytes", 1) > 0 for step in steps)
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["deterministic"] is True
    assert recorded["device"]["chip"] == find(name).chip()
    assert name not in recorded["device"]["absent"]
    assert os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1", "set before torch can import a vendor's package"
