"""What may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_sparsekv.kernels

PACKAGE = Path(vllm_sparsekv.__file__).parent
KERNELS = Path(vllm_sparsekv.kernels.__file__).parent
ROOTS = {"vllm_sparsekv": PACKAGE, "vllm_sparsekv.kernels": KERNELS}
SOURCES = sorted(
    path
    for root in ROOTS.values()
    for path in root.rglob("*.py")
    if "__pycache__" not in path.parts
)

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not to be imported here")

sys.meta_path.insert(0, Blocker())
"""


def imported_modules(path: Path) -> set[str]:
    """Every module a file names in an import, also inside functions and under conditions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def top_levels(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)}


def module_name(path: Path) -> str:
    root = "vllm_sparsekv.kernels" if path.is_relative_to(KERNELS) else "vllm_sparsekv"
    parts = path.relative_to(ROOTS[root]).with_suffix("").parts
    return ".".join([root, *(part for part in parts if part != "__init__")])


def import_without(modules: list[str], blocked: list[str], cwd: Path) -> None:
    """Import in a fresh interpreter in which ``blocked`` cannot be imported."""
    code = BLOCKER.format(blocked=blocked) + "".join(f"import {name}\n" for name in modules)
    code += f"assert not set({blocked!r}) & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def ours(path: Path) -> set[str]:
    """Modules of this package that a file imports; ``from module import name`` counts once."""
    modules = {module_name(source) for source in SOURCES} | set(ROOTS)
    return imported_modules(path) & modules


def room(name: str) -> str:
    """``vllm_sparsekv.format.layout`` is in ``format``, a module at the top in its own."""
    return name.split(".")[1] if "." in name else ""


def test_the_scan_sees_both_packages():
    names = {module_name(path) for path in SOURCES}
    assert {"vllm_sparsekv.engine.compat", "vllm_sparsekv.kernels.pack.reference"} <= names


def test_only_the_compat_folder_imports_vllm():
    importing = {path.parent for path in SOURCES if "vllm" in top_levels(path)}
    assert importing == {PACKAGE / "engine" / "compat"}


MAY_IMPORT = {
    "": set(),
    "settings": {"format"},
    "format": {"settings"},
    "kernels": {"format"},
    "calibration": {"format", "settings"},
    "engine": {"format", "settings", "kernels", "calibration"},
}
"""Rooms of the package, and which others each may know."""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_rooms_know_only_what_they_may(path):
    own = room(module_name(path))
    others = {room(name) for name in ours(path)} - {own, ""}
    assert others <= MAY_IMPORT[own], f"{path.name} in {own or 'the top'} imports {others}"


def test_references_and_api_import_without_vllm_and_triton(tmp_path):
    references = [module_name(path) for path in SOURCES if path.name == "reference.py"]
    assert len(references) >= 3
    import_without(
        [
            "vllm_sparsekv.format.codecs",
            "vllm_sparsekv.settings",
            "vllm_sparsekv.format.layout",
            *references,
            "vllm_sparsekv.kernels.api",
        ],
        ["vllm", "triton"],
        tmp_path,
    )


def test_every_kernel_module_imports_without_vllm(tmp_path):
    kernels = [module_name(path) for path in SOURCES if path.is_relative_to(KERNELS)]
    import_without(kernels, ["vllm"], tmp_path)


def test_calibration_imports_without_vllm(tmp_path):
    import_without(["vllm_sparsekv.calibration.balance"], ["vllm"], tmp_path)


def test_the_blocker_blocks(tmp_path):
    with pytest.raises(AssertionError, match="vllm.version is not|vllm is not"):
        import_without(["vllm_sparsekv.engine.compat"], ["vllm"], tmp_path)
