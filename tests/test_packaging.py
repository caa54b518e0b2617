"""What an installation holds: one package, never a top-level ``kernels``."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import vllm_sparsekv
import vllm_sparsekv.kernels

ROOT = Path(vllm_sparsekv.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_folder_is_not_taken_for_the_hugging_face_package():
    """The repository root is on ``sys.path`` of whatever runs there, and transformers probes it."""
    code = """
import kernels
from transformers.utils import is_kernels_available
print(kernels.__file__, hasattr(kernels, "__version__"), is_kernels_available())
"""
    assert run(code, ROOT) == f"{ROOT / 'kernels' / '__init__.py'} False False"


def test_kernels_is_part_of_the_package_and_nothing_else(tmp_path):
    code = """
import importlib.util
import vllm_sparsekv.kernels.api as api
print(api.__file__, importlib.util.find_spec("kernels"))
"""
    assert run(code, tmp_path) == f"{ROOT / 'kernels' / 'api.py'} None"


def test_version_and_entry_point():
    assert PROJECT["project"]["version"] == vllm_sparsekv.__version__
    assert metadata.version("vllm-sparsekv") == vllm_sparsekv.__version__
    points = metadata.entry_points(group="vllm.general_plugins", name="sparsekv")
    assert {point.value for point in points} == {"vllm_sparsekv.engine.plugin:register"}


def test_vllm_plugins_takes_the_name_of_the_package_too():
    points = PROJECT["project"]["entry-points"]["vllm.general_plugins"]
    names = ("sparsekv", "vllm_sparsekv")
    assert points == dict.fromkeys(names, "vllm_sparsekv.engine.plugin:register")


def test_commands_exist():
    scripts = PROJECT["project"]["scripts"]
    assert list(scripts) == ["sparsekv", "sparsekv-calibrate"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_wheel_holds_every_source_file(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for folder in ("vllm_sparsekv", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / PROJECT["project"]["readme"]).touch()
    (source / "kernels" / "cpu" / "prebuilt").mkdir()
    (source / "kernels" / "cpu" / "prebuilt" / "kernels-key-digest.so").touch()
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kernels = {
        f"vllm_sparsekv/{path.relative_to(source).as_posix()}"
        for path in (source / "kernels").rglob("*.*")
    }
    package = {
        path.relative_to(source).as_posix() for path in (source / "vllm_sparsekv").rglob("*.*")
    }
    assert packed == kernels | package
