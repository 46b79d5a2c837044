"""Reading the plan of a stored state without running what is in it.

torch.distributed.checkpoint keeps the plan as a pickle (`.metadata`), and a pickle can call anything. Checkpoints
travel, and digests show only that one is unchanged, not that it is harmless. So the pickle may name nothing but
the classes that a plan consists of, and the files that it names must be plain names of the same folder. The shards
are read by torch with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from fullweight.checkpoint.manifest import CorruptError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},  # where Python 3.13 has them
}
_NO_PLAN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)
"""What a pickle that is none, or of other things, may raise."""


class PlanReader(dcp.FileSystemReader):
    """The library's reader, whose plan is unpickled with nothing but a plan's classes at hand."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The plan; raises CorruptError when it is none."""
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as stream:
                found = _Unpickler(stream).load()
        except _NO_PLAN as error:
            raise CorruptError(f"{path} is no plan of a stored state: {error}") from None
        if not isinstance(found, Metadata):
            raise CorruptError(f"{path} is no plan of a stored state: it holds a {type(found).__name__}")
        for info in (found.storage_data or {}).values():
            name = str(getattr(info, "relative_path", ""))
            if Path(name).name != name or name in ("", ".", ".."):
                raise CorruptError(f"{path} names {name[:80]!r}, which is no file of that folder")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
