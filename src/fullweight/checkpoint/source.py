"""How a checkpoint was published, kept so that it can be written again byte for byte.

The form of a checkpoint is its files' headers (names, dtypes, shapes, order, shards), index and config.json as
they were, the scales of its quantised matrices, and the tensors that the model does not train (DSpark's draft
blocks). It is read off a published folder, or off the folder `source/` that an import leaves beside weights in
another format: some 3 % of an FP4 checkpoint, plus its draft blocks.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fullweight.checkpoint.catalogue import Catalogue
from fullweight.checkpoint.folder import PublishedFolder, row_chunks
from fullweight.checkpoint.published import INDEX
from fullweight.checkpoint.shards import Entry, ShardReader, ShardWriter, make_header, parse_header
from fullweight.core.errors import CheckpointError
from fullweight.models.deepseek_v4.config import DeepSeekV4Config

SOURCE = "source"
"""Name of the folder, inside an imported checkpoint, that keeps the form of its source."""
_HEADERS = "headers"
_CONFIG = "config.json"


class SourceForm:
    """The form of a published checkpoint; `of` finds it for a folder.

    `headers` by file; `catalogue` says what they announce. Raises CheckpointError as `Catalogue` does.
    """

    def __init__(self, path: Path, headers: dict[str, bytes]) -> None:
        self.path, self.headers = path, headers
        self.files: dict[str, str] = {}  # stored name -> file
        entries: dict[str, Entry] = {}
        for file, header in headers.items():
            found = parse_header(header, str(path / file))
            self.files |= dict.fromkeys(found, file)
            entries |= found
        self.config = DeepSeekV4Config.from_file(path)
        self.catalogue = Catalogue(path, self.config, entries, self.files)
        self._readers: dict[str, ShardReader] = {}

    @classmethod
    def of(cls, path: str | Path) -> SourceForm:
        """The form kept in `path`/source, or else that of `path` itself.

        Raises CheckpointError when the folder is damaged.
        """
        path = Path(path)
        kept = path / SOURCE
        if kept.is_dir():
            return cls.kept(kept)
        with PublishedFolder(path) as folder:
            return cls.of_folder(folder)

    @classmethod
    def of_folder(cls, folder: PublishedFolder) -> SourceForm:
        """The form of an open folder, quantised or not; it opens the folder's files itself."""
        return cls(folder.path, {file: reader.header for file, reader in folder.readers.items()})

    @classmethod
    def kept(cls, path: Path) -> SourceForm:
        """The form that `keep` left in the folder `path`. Raises CheckpointError when it is none."""
        headers = {p.name: p.read_bytes() for p in sorted((path / _HEADERS).glob("*.safetensors"))}
        if not headers:
            raise CheckpointError(f"{path} is no kept source: it has no {_HEADERS}/*.safetensors")
        return cls(path, headers)

    # ---- what it holds --------------------------------------------------------------------------------

    @property
    def config_bytes(self) -> bytes:
        return (self.path / _CONFIG).read_bytes()

    @property
    def index_bytes(self) -> bytes | None:
        index = self.path / INDEX
        return index.read_bytes() if index.exists() else None

    def scales(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows of the scales of a published matrix, as stored; None where the source has none."""
        stored = self.catalogue.tensors.get(name)
        return None if stored is None or stored.scale is None else self.raw(stored.scale, start, stop)

    def raw(self, stored_name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of scales or of a draft block's tensor, as stored."""
        file = self.files[stored_name]
        if file not in self._readers:
            self._readers[file] = ShardReader(self.path / file)
        reader = self._readers[file]
        if reader.entries.get(stored_name) is None:
            raise CheckpointError(f"{reader.path} lacks {stored_name}, which its source keeps")
        return reader.read(stored_name, start, stop)

    def kept_names(self) -> list[str]:
        """Stored tensors whose data belongs to the form: all scales, and draft blocks."""
        scales = [t.scale for t in self.catalogue.tensors.values() if t.scale is not None]
        return scales + self.catalogue.draft_names()

    # ---- keeping --------------------------------------------------------------------------------------

    def keep(self, into: Path) -> None:
        """Write the form into the folder `into`, which is new or empty: headers, index, config, kept tensors."""
        (into / _HEADERS).mkdir(parents=True)
        for file, header in self.headers.items():
            (into / _HEADERS / file).write_bytes(header)
        (into / _CONFIG).write_bytes(self.config_bytes)
        if self.index_bytes is not None:
            (into / INDEX).write_bytes(self.index_bytes)
        by_file: dict[str, list[str]] = {}
        for name in self.kept_names():
            by_file.setdefault(self.files[name], []).append(name)
        for file, names in by_file.items():
            listed = {n: (self.catalogue.entries[n].dtype, self.catalogue.entries[n].shape) for n in names}
            writer = ShardWriter(into / file, make_header(listed))
            try:
                for name in names:
                    for first, last in row_chunks(
                        self.catalogue.entries[name].shape, 0, self.catalogue.entries[name].shape[0]
                    ):
                        writer.append(name, self.raw(name, first, last))
                writer.finish()
            finally:
                writer.close()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
