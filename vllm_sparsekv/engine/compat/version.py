"""Which vLLM this package supports."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm.version import __version__ as VLLM_VERSION

SUPPORTED = ">=0.32,<0.34"


def check_version(version: str) -> None:
    """Raise ImportError unless this package supports the vLLM version."""
    if Version(version).base_version not in SpecifierSet(SUPPORTED):
        raise ImportError(
            f"vllm {version} found, vllm_sparsekv needs {SUPPORTED}: "
            f"pip install 'vllm{SUPPORTED}' (or set VLLM_PLUGINS to leave sparsekv out)"
        )


check_version(VLLM_VERSION)
