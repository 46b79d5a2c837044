"""A stand-in for CANN's shared libraries, so that torch_npu imports on a machine without an Ascend.

torch_npu needs CANN for two things: symbols that its own libraries leave undefined, and names that it looks up
while it runs. Both are read from the installed wheel; a C file with one function for each, which does nothing and
returns 0 (success), is compiled under the names of the libraries. A few functions answer: what the chip is called,
how many there are, how long a compile option is.

That is enough to import torch_npu, to read the schema of every operator and to run operators on tensors without
data. Nothing computes: values, times and memory of a chip cannot be had this way.

    eval "$(python tests/ascend/cann.py)"     # the environment in which torch_npu imports
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHIP = "Ascend910_9391"  # a die of a 910C
DIES = 16  # dies of a node

LIBRARIES = ("hccl", "ascendcl", "acl_op_compiler", "ge_runner", "graph", "atb", "acl_tdt_channel")
_LOOKED_UP = re.compile(rb"(?<=\0)((?:acl|Hccl|hccl|Hcom|hcom|Hcc|rt|Msprof|halGet|dsmi)[A-Za-z0-9_]{2,80})(?=\0)")

_ANSWERS = """
const char *aclrtGetSocName(void) { return "@CHIP@"; }
int aclrtGetDeviceCount(unsigned *count) { *count = @DIES@; return 0; }
static int current;
int aclrtGetDevice(int *device) { *device = current; return 0; }
int aclrtSetDevice(int device) { current = device; return 0; }
size_t aclGetCompileoptSize(int option) { (void)option; return 8; }
int aclGetCompileopt(int option, char *value, size_t length) {
    (void)option;
    memset(value, 0, length);
    if (length) value[0] = '0';
    return 0;
}
int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
    (void)kind;
    *free_bytes = *total_bytes = (size_t)64 << 30;
    return 0;
}
static int handle;
int aclrtCreateStream(void **stream) { *stream = &handle; return 0; }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) { *stream = &handle; return 0; }
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { *event = &handle; return 0; }
int aclrtCreateEventWithFlag(void **event, unsigned flag) { *event = &handle; return 0; }
int aclrtGetCurrentContext(void **context) { *context = &handle; return 0; }
const char *aclGetRecentErrMsg(void) { return ""; }
""".replace("@CHIP@", CHIP).replace("@DIES@", str(DIES))


def environment() -> dict[str, str]:
    """Variables with which a new process imports torch_npu; builds the libraries on the first call."""
    found = ROOT / ".venv" / "ascend" / "torch_npu"
    if not found.is_dir():
        raise SystemExit(f"torch_npu is not in {found.parent}; run `make test-ascend`, which puts it there")
    return {
        "LD_LIBRARY_PATH": _first(build(found), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _first(found.parent, "PYTHONPATH"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would import torch_npu in every process
    }


def _first(folder: Path, variable: str) -> str:
    parts = [str(folder), *filter(None, os.environ.get(variable, "").split(":"))]
    return ":".join(dict.fromkeys(parts))


def build(package: Path) -> Path:
    """The folder of the libraries for the torch_npu in `package`; compiled once for its exact files."""
    libraries = sorted((*package.glob("lib/*.so"), *package.glob("_C*.so")))
    key = hashlib.sha256(Path(__file__).read_bytes())
    for library in libraries:
        key.update(f"{library.name} {library.stat().st_size} {library.stat().st_mtime_ns}".encode())
    folder = ROOT / "build" / "cann" / key.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _compile(source(libraries), Path(scratch))
            made = Path(scratch) / "made"
            if not folder.exists():  # another process may have been faster
                os.rename(made, folder)
    return folder


def source(libraries: list[Path]) -> str:
    """The C file: every name that the libraries want from CANN."""
    answered = set(re.findall(r"\b(\w+)\([^)]*\) \{", _ANSWERS))
    names = (undefined(libraries) | looked_up(libraries)) - answered
    lines = ["#include <stddef.h>", "#include <string.h>", _ANSWERS]
    for name in sorted(names):
        # vtables and type information of C++ are data, all else is called
        data = name.startswith(("_ZTV", "_ZTI", "_ZTS"))
        lines.append(f"void *{name}[64];" if data else f"long {name}() {{ return 0; }}")
    return "\n".join(lines) + "\n"


def undefined(libraries: list[Path]) -> set[str]:
    """Symbols that neither these libraries nor torch, Python or the C library define."""
    torch = importlib.util.find_spec("torch")  # not imported: torch would import torch_npu
    assert torch is not None
    assert torch.origin is not None
    torch_libraries = sorted((Path(torch.origin).parent / "lib").glob("*.so*"))
    wanted = _symbols(libraries, "--undefined-only", kinds="U")
    known = _symbols([*libraries, *torch_libraries], "--defined-only")
    return {
        n
        for n in wanted - known
        if "@" not in n and not re.match(r"_?Py|_?GLOBAL_|pthread_|dl(open|sym|close|error)", n)
    }


def looked_up(libraries: list[Path]) -> set[str]:
    """Names of CANN that stand as strings in the libraries."""
    found: set[str] = set()
    for library in libraries:
        found.update(name.decode() for name in _LOOKED_UP.findall(library.read_bytes()))
    return found


def _symbols(libraries: list[Path], which: str, kinds: str | None = None) -> set[str]:
    command = ["nm", "--dynamic", "--format=posix", which, *map(str, libraries)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    parts = [line.split() for line in lines if not line.endswith(":")]
    return {p[0] for p in parts if len(p) > 1 and (kinds is None or p[1] in kinds)}


def _compile(text: str, scratch: Path) -> None:
    (scratch / "cann.c").write_text(text, encoding="utf-8")
    (scratch / "made").mkdir()
    base = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin"]
    subprocess.run([*base, "-c", "cann.c", "-o", "cann.o"], cwd=scratch, check=True)
    for name in LIBRARIES:
        target = f"made/lib{name}.so"
        subprocess.run([*base, "cann.o", "-o", target, f"-Wl,-soname,lib{name}.so"], cwd=scratch, check=True)


if __name__ == "__main__":
    for variable, value in environment().items():
        sys.stdout.write(f"export {variable}={value}\n")
