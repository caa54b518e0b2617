"""What an installation holds: one package, never a top-level ``kernels``."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import vllm_sparsekv
import vllm_sparsekv.kernels
from vllm_sparsekv.kernels.cpu import build

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
    assert "version" not in PROJECT["project"]
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


class Built(NamedTuple):
    """A source distribution, and the wheel that was built from nothing else.

    Attributes:
        source: the files both were made from, and a compiled library.
    """

    source: Path
    sdist: Path
    wheel: Path

    def files(self) -> set[str]:
        """What an installation should hold, relative to where packages lie."""
        kernels = (self.source / "kernels").rglob("*.*")
        package = (self.source / "vllm_sparsekv").rglob("*.*")
        return {f"vllm_sparsekv/{path.relative_to(self.source).as_posix()}" for path in kernels} | {
            path.relative_to(self.source).as_posix() for path in package
        }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("vllm_sparsekv", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", PROJECT["project"]["readme"]):
        shutil.copy(ROOT / name, source)
    (source / "kernels" / "cpu" / "prebuilt").mkdir()
    (source / "kernels" / "cpu" / "prebuilt" / "kernels-key-digest.so").touch()

    def make(kind: str, cwd: Path) -> None:
        code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(folder)]
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=100)

    make("sdist", source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    make("wheel", unpacked)
    (wheel,) = folder.glob("*.whl")
    return Built(source, sdist, wheel)


def test_wheel_holds_every_source_file(built: Built):
    names = zipfile.ZipFile(built.wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == built.files()
    assert {"vllm_sparsekv/py.typed", "vllm_sparsekv/kernels/step/cpu.cpp"} <= packed


def test_both_are_named_by_the_one_version(built: Built):
    version = vllm_sparsekv.__version__
    assert built.sdist.name == f"vllm_sparsekv-{version}.tar.gz"
    assert built.wheel.name == f"vllm_sparsekv-{version}-py3-none-any.whl"


def test_an_installed_wheel_needs_no_file_of_the_repository(built: Built, tmp_path: Path):
    """In an environment of its own, which sees torch's folder but none of the links into here."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*map(str, pip), str(built.wheel)], check=True, capture_output=True, timeout=100)
    code = """
import sys
from importlib import metadata
from pathlib import Path
import vllm_sparsekv
sys.path.append(sys.argv[1])
from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import build
home = Path(vllm_sparsekv.__file__).parent
assert home.is_relative_to(sys.prefix), home
ours = [m.__file__ for n, m in sys.modules.items() if n.startswith("vllm_sparsekv")]
assert len(ours) > 10 and all(Path(file).is_relative_to(home) for file in ours), ours
assert all((build.KERNELS / source).stat().st_size for source in build.SOURCES)
(here,) = metadata.distributions(name="vllm-sparsekv", path=[str(home.parent)])
points = here.entry_points.select(group="vllm.general_plugins").names
print(vllm_sparsekv.__version__, here.version, *sorted(points), build.key())
"""
    done = subprocess.run(
        [python, "-c", code, Path(torch.__file__).parents[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    version = vllm_sparsekv.__version__
    assert done.stdout.split() == [version, version, "sparsekv", "vllm_sparsekv", build.key()]
