"""Nothing that differs by one bit from what was written is ever called a generation."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.checkpoint.saved import facts, save, state

from fullweight.checkpoint import store
from fullweight.checkpoint.manifest import MANIFEST, SEAL, CorruptError, read_manifest, verify


def test_the_manifest_says_what_the_state_is_of(tmp_path: Path) -> None:
    """Step, model, configuration with its digest, ranks, versions, and every file; the chain goes back."""
    first, second = (read_manifest(save(tmp_path, step)) for step in (1, 2))
    manifest, sha256 = second
    assert manifest.facts == facts(2)
    assert manifest.config_sha256 == hashlib.sha256(b'{"name": "test"}').hexdigest()
    assert manifest.previous == first[1]
    assert manifest.save_id != first[0].save_id
    assert sha256 == hashlib.sha256((tmp_path / "step-2" / MANIFEST).read_bytes()).hexdigest()
    names = {p.name for p in (tmp_path / "step-2").iterdir()}
    assert set(manifest.files) == names - {MANIFEST, SEAL}


def test_the_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    """Anybody can check a checkpoint without this program."""
    path = save(tmp_path, 1)
    done = subprocess.run(["sha256sum", "--check", SEAL], cwd=path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, entry in json.loads((path / MANIFEST).read_text())["files"].items():
        said = subprocess.run(["sha256sum", name], cwd=path, capture_output=True, text=True, check=True).stdout
        assert said.split()[0] == entry["sha256"]


def test_every_random_bit_flip_is_found(tmp_path: Path) -> None:
    """30 flips over all files, the manifest and its seal among them; `make test-crash` makes 300."""
    path = save(tmp_path, 1)
    files, draw = sorted(path.iterdir()), random.Random(1)
    for number in range(30):
        file = files[number % len(files)]
        intact = file.read_bytes()
        position, bit = draw.randrange(len(intact)), draw.randrange(8)
        changed = bytearray(intact)
        changed[position] ^= 1 << bit
        file.write_bytes(changed)
        with pytest.raises(CorruptError, match=file.name if file.name not in (MANIFEST, SEAL) else "manifest"):
            verify(path)
        file.write_bytes(intact)
    verify(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_shard_is_named_with_its_size(tmp_path: Path, kept: float) -> None:
    """Any length but the right one."""
    path = save(tmp_path, 1)
    shard = path / "__0_0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CorruptError, match=rf"__0_0_0\.distcp has [\d,]+ bytes, {len(data):,} were written"):
        verify(path)


def test_a_mixed_generation_says_where_the_shard_is_from(tmp_path: Path) -> None:
    """Another step's shard of the same size is refused, and recognised."""
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(older / "__0_0_0.distcp", newer / "__0_0_0.distcp")
    with pytest.raises(
        CorruptError, match=r"step-2: __0_0_0\.distcp has SHA-256 .* it is __0_0_0\.distcp of step-1"
    ):
        verify(newer)


def test_swapped_shards_of_one_generation_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of equal size under each other's names."""
    monkeypatch.setattr(store, "_FILE_BYTES", 256)
    monkeypatch.setattr(store.Peers, "num_threads", 2)
    values = state()
    equal = {"model.a": values["model.noise"], "model.b": values["model.noise"] + 1}
    path = store.save(tmp_path, equal, facts(1)).path
    one, two = path / "__0_0_0.distcp", path / "__0_1_0.distcp"
    assert one.stat().st_size == two.stat().st_size
    contents = one.read_bytes(), two.read_bytes()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    with pytest.raises(
        CorruptError, match=r"__0_0_0\.distcp has SHA-256 .* it is __0_1_0\.distcp of step-1 \(and 1"
    ):
        verify(path)


def test_a_stale_manifest_is_refused(tmp_path: Path) -> None:
    """Manifest and seal of another step, each right in itself."""
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    for name in (MANIFEST, SEAL):
        shutil.copy(older / name, newer / name)
    with pytest.raises(CorruptError, match=r"manifest\.json is stale: it was written for step-1, this is step-2"):
        verify(newer)


@pytest.mark.parametrize("name", [MANIFEST, SEAL, "__0_0_0.distcp", ".metadata"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """Whichever it is."""
    path = save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CorruptError, match=rf"{name} is missing"):
        verify(path)


def test_a_file_that_does_not_belong_is_named(tmp_path: Path) -> None:
    """A folder holds exactly what was written, such as no third rank's shard."""
    path = save(tmp_path, 1)
    (path / "__2_0_0.distcp").write_bytes(b"more")
    with pytest.raises(CorruptError, match=r"__2_0_0\.distcp does not belong"):
        verify(path)


def test_a_checkpoint_without_digests_is_refused(tmp_path: Path) -> None:
    """An old one, or another tool's, cannot be told from a damaged one."""
    path = tmp_path / "step-5"
    path.mkdir()
    (path / "__0_0_0.distcp").write_bytes(b"weights")
    (path / "complete.json").write_text('{"step": 5, "files": {"__0_0_0.distcp": 7}}')
    with pytest.raises(CorruptError, match=r"manifest\.json is missing, so nothing says what was written"):
        verify(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"[]", b"{}", b"1" * 5000])
def test_a_sealed_manifest_that_is_none_is_refused(tmp_path: Path, text: bytes) -> None:
    """Somebody else's manifest with a right seal: a reason, whatever is wrong with it."""
    path = save(tmp_path, 1)
    (path / MANIFEST).write_bytes(text)
    (path / SEAL).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")
    with pytest.raises(CorruptError, match=r"manifest\.json cannot be understood"):
        verify(path)


def test_a_copy_under_another_name_verifies(tmp_path: Path) -> None:
    """A backup may be called anything that is not a generation's name."""
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "before-the-change")
    assert verify(tmp_path / "before-the-change").step == 1
    shutil.copytree(path, tmp_path / "step-9")
    with pytest.raises(CorruptError, match="stale"):
        verify(tmp_path / "step-9")
