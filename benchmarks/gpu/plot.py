"""The figure of ``gpu.json``: speed-up over dense attention, and share of the copy bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(result: dict[str, Any], path: Path) -> None:
    """Both against the context, at the largest batch that every context has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["decode"]
    contexts = sorted({row["context"] for row in rows})
    shared = [{r["batch"] for r in rows if r["context"] == context} for context in contexts]
    batch = max(set.intersection(*shared))
    rows = sorted((r for r in rows if r["batch"] == batch), key=lambda r: r["context"])
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    labels = {"speedup": "times dense bf16 attention", "of_copy_bandwidth": "of copy bandwidth"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name in rows[0]["sparse"]:
            axis.plot(contexts, [r["sparse"][name].get(key) for r in rows], "o-", label=name)
        axis.set(xscale="log", xlabel="context, tokens", ylabel=label, ylim=(0, None))
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=30)
        axis.axhline(1, color="0.7", linewidth=1)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    about = result["machine"]
    software = {"driver": about.get("driver")} | about["versions"]
    named = ", ".join(f"{name} {version}" for name, version in software.items())
    figure.suptitle(f"Decode, batch {batch}, {about['device']}, {named}", fontsize="medium")
    figure.savefig(path, dpi=120)
