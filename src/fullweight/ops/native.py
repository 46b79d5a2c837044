"""Compile C++ kernels once per machine and call them: cpu/kernels/kernels.cpp here, others by their path.

A source needs no more than a C++ compiler, unless its options say so; it is compiled in seconds for the
processor it runs on and kept in a cache folder, under a name that holds the hash of the source and its headers,
the compiler and the processor's features. OpenMP is the copy that torch has already loaded: two copies would each
keep a pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from fullweight.core.errors import OperationError

SOURCE = Path(__file__).parent / "cpu" / "kernels" / "kernels.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")


def find_compiler() -> str | None:
    """Path of the C++ compiler: $CXX, or the first of c++, g++, clang++ on PATH."""
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $FULLWEIGHT_CACHE, or fullweight/ in the user's cache folder."""
    root = os.environ.get("FULLWEIGHT_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fullweight"


@functools.cache
def kernels() -> ctypes.CDLL:
    """The kernels of the CPU operations."""
    return load_library(SOURCE)


@functools.cache
def load_library(source: Path, *options: str) -> ctypes.CDLL:
    """The library compiled from `source` with FLAGS and `options`.

    Raises OperationError saying what is missing when it cannot be built.
    """
    compiler = find_compiler()
    if compiler is None:
        raise OperationError("compiled kernels need a C++ compiler (c++, g++ or clang++ on PATH, or $CXX)")
    library = cache_folder() / f"{source.stem}-{_fingerprint(compiler, source, options)}.so"
    if not library.exists():
        _compile(compiler, source, library, options)
    openmp = _loaded_openmp()
    if openmp is not None:
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise OperationError(f"{library} does not load ({error}); delete it to have it compiled anew") from None


_silent: ContextVar[bool] = ContextVar("kernels are left out", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Inside it kernels are not run: their results keep whatever was there, which tensors without data allow."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def call(name: str, *arguments: Tensor | int | float | None, dtype: torch.dtype = torch.float32) -> None:
    """Run a kernel's version for `dtype` (float32 or bfloat16); tensors are passed as they lie in memory."""
    if _silent.get():
        return
    suffix = "h" if dtype == torch.bfloat16 else "f"
    getattr(kernels(), f"{name}_{suffix}")(*map(_argument, arguments))


def _argument(value: Tensor | int | float | None) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        assert value.is_contiguous(), "kernels read contiguous tensors"
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def _compile(compiler: str, source: Path, library: Path, options: tuple[str, ...]) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        # OpenMP's symbols are left to the copy that torch loads
        link = [compiler, "-shared", str(compiled), "-o", str(linked), *options]
        if _loaded_openmp() is None:
            link.append("-fopenmp")
        for command in ([compiler, *FLAGS, *options, "-c", str(source), "-o", str(compiled)], link):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OperationError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        os.replace(linked, library)


def _fingerprint(compiler: str, source: Path, options: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*texts, version, *FLAGS, *options, _processor(), torch.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return platform.processor() + platform.machine()


def _loaded_openmp() -> str | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split()[-1] for line in maps.read_text(encoding="utf-8").splitlines() if "/" in line}
    return next((path for path in sorted(paths) if "gomp" in Path(path).name or "iomp" in Path(path).name), None)
