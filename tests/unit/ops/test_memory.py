"""Large tensors in a range of their own: nothing overlaps, everything comes back, other processes are safe."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from fullweight.ops.cpu.memory import LargeBlocks, large_blocks
from fullweight.ops.native import find_compiler

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or find_compiler() is None, reason="needs Linux and a C++ compiler"
)
MEGABYTE = 1 << 20


def held() -> LargeBlocks:
    found = large_blocks()
    assert found is not None, "the allocator must compile and install where there is a compiler"
    return found


def filled(bytes_: int, value: int) -> Tensor:
    return torch.full((bytes_,), value, dtype=torch.uint8)


def test_a_large_tensor_is_counted_and_returned() -> None:
    before = held().in_use
    tensor = torch.empty(8 * MEGABYTE, dtype=torch.uint8)
    assert 8 * MEGABYTE <= held().in_use - before < 8 * MEGABYTE + 4096
    assert tensor.data_ptr() % 64 == 0
    del tensor
    assert held().in_use == before
    small = torch.empty(1024)
    assert held().in_use == before
    assert len(small) == 1024


def test_blocks_never_overlap_and_holes_are_reused() -> None:
    """Two thousand random allocations of 0.1 to 4 MB, 40 alive at a time, each with its own content."""
    chooser, alive = random.Random(0), {}
    start = held()
    peak = 0
    for number in range(2000):
        if len(alive) == 40:
            tensor, value = alive.pop(chooser.choice(sorted(alive)))
            assert bool((tensor == value).all())
        alive[number] = filled(chooser.randint(100_000, 4 * MEGABYTE), number % 251), number % 251
        tensor = None
        peak = max(peak, held().in_use)
    for tensor, value in alive.values():
        assert bool((tensor == value).all())
    assert held().most <= max(start.most, start.in_use) + 1.5 * (peak - start.in_use)
    alive.clear()
    del tensor
    assert held().in_use == start.in_use


def test_storages_that_grow_move_or_leave_torch() -> None:
    before = held().in_use
    tensor = torch.arange(MEGABYTE)
    tensor.resize_(3 * MEGABYTE)
    assert torch.equal(tensor[:MEGABYTE], torch.arange(MEGABYTE))
    array = filled(MEGABYTE, 7).numpy()  # keeps the block alive
    assert int(array.sum(dtype="int64")) == 7 * MEGABYTE
    shared = filled(MEGABYTE, 3).share_memory_()
    assert int(shared[-1]) == 3
    assert len(torch.empty(0)) == 0
    del tensor, array, shared
    assert held().in_use == before


def test_threads_allocate_at_the_same_time() -> None:
    before, wrong = held().in_use, []

    def work(value: int) -> None:
        for size in range(150_000, 2_000_000, 50_000):
            tensor = filled(size, value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held().in_use == before


SCRIPT = """
import os, threading, torch
from fullweight.ops.cpu.memory import large_blocks, prepare_memory
torch.set_num_threads(1)
print(prepare_memory(), large_blocks() is not None)
kept = torch.full((1 << 20,), 5, dtype=torch.uint8)
stop = threading.Event()
def churn():
    while not stop.is_set():
        torch.empty(1 << 20, dtype=torch.uint8)
thread = threading.Thread(target=churn)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        mine = torch.full((1 << 20,), 9, dtype=torch.uint8)
        os._exit(0 if int(kept[-1]) == 5 and int(mine[-1]) == 9 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
"""


@pytest.mark.parametrize(("switch", "said"), [("auto", "True True"), ("system", "False False")])
def test_a_fork_while_another_thread_allocates(switch: str, said: str) -> None:
    environment = {**os.environ, "FULLWEIGHT_CPU_ALLOCATOR": switch}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said


def test_an_unknown_switch_is_refused() -> None:
    environment = {**os.environ, "FULLWEIGHT_CPU_ALLOCATOR": "jemalloc"}
    done = subprocess.run(
        [sys.executable, "-c", "from fullweight.ops.cpu.memory import prepare_memory as p; p()"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "expected auto or system" in done.stderr
