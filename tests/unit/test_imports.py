"""Which modules may know of which: the rules that the import linter cannot state."""

import ast
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
