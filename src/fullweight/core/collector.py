"""Python's collector of reference cycles, kept out of training steps.

A step makes tens of thousands of objects, so the collector would run in its middle, on every rank at another
moment, while the other ranks wait. A step leaves no cycles behind (tests/unit/train/test_step_memory.py); what
other code may have left is collected between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect nothing inside, and what is young at the end; a collector that is off already stays so."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect(1)


@contextmanager
def older_objects_left_alone() -> Iterator[None]:
    """Collections inside do not walk over what was there before: a model, its optimizers and all imports."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
