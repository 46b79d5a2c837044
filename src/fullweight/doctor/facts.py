"""What is known of one rank's machine: plain values, so that they can be sent, written, and checked elsewhere.

`gather.py` fills them in on the machine itself; every check is a function of them alone. A value that could not be
read is None, never a guess. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError
from fullweight.core.strict_json import parse_json
from fullweight.doctor.settings import Setting

FORMAT = "fullweight-doctor-1"


class Versions(Config):
    """Software, each None when it is absent or does not say."""

    python: str
    torch: str
    torch_required: str | None = None  # by this package
    torch_cuda: str | None = None  # CUDA that torch was built for
    nccl_library: str | None = None
    npu_torch: str | None = None  # torch_npu
    cann: str | None = None
    driver: str | None = None  # of the accelerator


class Devices(Config):
    """Accelerators of the machine, as this process sees them."""

    count: int = 0  # that the process sees
    chips: tuple[
        str, ...
    ] = ()  # models: of all visible ones, or of the rank's own when other ranks tell of theirs
    memory_bytes: tuple[int, ...] = ()  # of the same
    visible: tuple[int, ...] = ()  # the machine's numbers of the visible ones
    present: int | None = None  # on the machine, visible or not
    per_chip: int | None = None
    links: tuple[tuple[str, ...], ...] | None = None  # between visible ones, in the vendor's words


class Host(Config):
    """What the machine itself offers."""

    cpu_count: int
    cores: int  # that this process may use
    memory_bytes: int
    open_files: int  # soft limit
    open_files_hard: int
    shared_memory_free_bytes: int | None = None
    run_folder: str
    run_folder_free_bytes: int
    interfaces: tuple[str, ...] = ()
    ports_in_use: tuple[int, ...] = ()  # of those that ranks will meet in
    reserved_ports: str = ""  # net.ipv4.ip_local_reserved_ports
    automatic_ports: str = ""  # net.ipv4.ip_local_port_range


class OperationResult(Config):
    """One operation beside the reference on the CPU: relative norm of the error, of values and of gradients."""

    operation: str
    dtype: str
    error: float | None = None
    gradient_error: float | None = None
    tolerance: float
    failure: str | None = None  # it raised


class CollectiveResult(Config):
    """One collective over all ranks: whether every rank got the right values, and how fast."""

    collective: str
    device: str
    message_bytes: int
    correct: bool
    gigabytes_per_second: float | None = None  # bus bandwidth: bytes that each rank sends, over the time
    failure: str | None = None


class Facts(Config):
    """One rank's machine."""

    host_name: str
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    device: Literal["cpu", "cuda", "ascend"]
    asked: str = "auto"  # what the recipe or the command names
    absent: dict[str, str] = Field(default_factory=dict)  # why other devices cannot be used
    hardware: dict[str, int] = Field(default_factory=dict)  # device files in /dev, by vendor
    operations_set: str = ""
    versions: Versions
    devices: Devices = Devices()
    host: Host
    environment: dict[str, str] = Field(default_factory=dict)
    applied: dict[str, str] = Field(default_factory=dict)  # of those, what the recipe set
    clock_offset_seconds: float | None = None  # ahead of rank 0's
    clock_uncertainty_seconds: float | None = None
    operations: tuple[OperationResult, ...] = ()


class Job(Config):
    """Every rank's facts, and what the job wants: what `--json` writes and `--facts` reads."""

    format: Literal["fullweight-doctor-1"] = FORMAT  # type: ignore[assignment]
    ranks: int = Field(ge=1)
    group_timeout_seconds: PositiveFloat | None = None
    deterministic: bool = False
    accept: tuple[str, ...] = ()
    needed_disk_bytes: int | None = None  # for checkpoints and export of the recipe
    machines: tuple[Facts, ...] = Field(min_length=1)  # one a rank, in rank order
    collectives: tuple[CollectiveResult, ...] = ()

    def setting(self, facts: Facts) -> Setting:
        """What rules over the environment of this rank go by."""
        chips = facts.devices.chips
        return Setting(
            device=facts.device,
            ranks=self.ranks,
            group_timeout_seconds=self.group_timeout_seconds,
            deterministic=self.deterministic,
            chip=chips[0] if chips else "",
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Facts that `--json` wrote; other keys of the file (findings) are ignored. Raises ConfigError."""
        try:
            values = parse_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; give a file that --json wrote") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}; give a file that --json wrote") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ConfigError(
                f"{path} has no format {FORMAT!r}; give a file that `fullweight doctor --json` wrote"
            )
        return cls.resolve({k: v for k, v in values.items() if k in cls.model_fields}, str(path))

    def as_dict(self) -> dict[str, object]:
        loaded: dict[str, object] = json.loads(self.model_dump_json())
        return loaded
