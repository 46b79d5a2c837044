"""Which modules may know of which: the rules that the import linter cannot state."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fullweight

PACKAGE = Path(fullweight.__file__).parent


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, `import a.b` and `from a.b import c` alike."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_model_files_are_single_device_mathematics() -> None:
    """Nothing under models/ and ops/ imports torch.distributed: sharding is applied from outside."""
    files = [*(PACKAGE / "models").rglob("*.py"), *(PACKAGE / "ops").rglob("*.py")]
    assert len(files) > 10
    for path in files:
        assert not {n for n in imported(path) if n.startswith("torch.distributed")}, path


def test_training_names_no_method() -> None:
    """train/ reaches methods through their table alone."""
    for path in (PACKAGE / "train").glob("*.py"):
        assert not {n for n in imported(path) if n.startswith("fullweight.methods.")} - {
            "fullweight.methods.Method",
            "fullweight.methods.MethodConfig",
        }, path


VENDORS = re.compile(
    r"\b(torch_npu|npu|cuda|nvtx|nccl|hccl|mstx|nvidia-smi|npu-smi)\b|^(cuda|npu)$", re.IGNORECASE
)
# Where vendors are known: the devices themselves, their operations and the table of these, and what the planner
# counts of them.
OF_VENDORS = ("devices/", "ops/__init__.py", "ops/ascend", "ops/cuda", "planner/operations/")
# The doctor knows vendors' settings by name, and reaches their devices through the contract like everybody.
OF_SETTINGS = ("doctor/",)


def code_words(path: Path, strings: bool) -> Iterator[tuple[int, str]]:
    """(line, text) of every name, attribute and module of a file, and of `strings` but for its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno, f"{getattr(node, 'module', '')} {' '.join(alias.name for alias in node.names)}"
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value


def test_vendors_are_named_in_their_files_alone() -> None:
    """No torch.cuda, torch.npu, nccl or hccl, and no comparison with such a device type, anywhere else."""
    found, seen = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, word in code_words(path, strings=not name.startswith(OF_SETTINGS)):
            if VENDORS.search(word):
                (seen.add(name) if name.startswith(OF_VENDORS) else found.append(f"{name}:{line}: {word}"))
    assert not found
    assert {"devices/ascend.py", "devices/cuda.py"} <= seen, "the search finds vendors where they are"
