"""Deterministic mode: the same layout gives the same bits.

On a CPU every operation here repeats bit for bit anyway, and so do the exchanges between ranks, which add in rank
order. On an accelerator some of torch's operations add in the order in which threads finish; in this mode torch
takes the ordered ones instead, which are slower, and raises where it has none. Another layout adds in another
order: equal to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fullweight.devices import Device


@contextmanager
def deterministic(on: bool, device: Device) -> Iterator[None]:
    """Within it, if `on`, only what repeats bit for bit is used on the device; as before afterwards.

    It has to begin before the ranks meet, because a device's collectives may ask once, when they are set up.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    device.set_deterministic(True)
    try:
        yield
    finally:
        device.set_deterministic(before)
