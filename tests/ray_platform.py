"""vLLM's CPU platform with what its Ray executors ask of a platform, a resource that Ray counts.

vLLM takes it for a platform plug-in where :func:`entry_point` has written its metadata.
"""

from __future__ import annotations

from pathlib import Path

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id: str) -> int:
        """vLLM 0.33's CPU worker takes it for a memory node; this machine's first."""
        return 0


def activate() -> str:
    return "ray_platform.RayCpuPlatform"


def entry_point(folder: Path) -> None:
    """Make ``folder``, on Python's path, announce the plug-in."""
    metadata = folder / "ray_platform-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-platform\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_platform = ray_platform:activate\n"
    )
