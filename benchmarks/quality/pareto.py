"""Bytes per token against perplexity ratio: the table and the picture."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import stdev

import torch

from quality.methods import CALIBRATED, Method, Shape
from quality.perplexity import summary
from quality.results import Results

SHORT_CONTEXT = 4096
"""The context whose window bytes are counted for shorter samples."""

WORST_RATIO = 1.04
"""Perplexity ratios beyond are drawn at this height, their value in the legend."""


def rows(
    path: Path, model: str, methods: dict[str, Method], shape: Shape, dtype: torch.dtype
) -> list[dict[str, object]]:
    """One row per method and sample length of one model, best bytes last.

    A row's ratio is the geometric mean over texts, its error the standard error over all samples
    (NaN for one sample), its KL and top-1 are plain means; only decoding steps (``chunk`` 1) and
    evaluations of a method's present settings and code count.
    """
    dense_bytes = 2 * shape.head_size * dtype.itemsize
    codecs = {name: method.codec(shape, dtype) for name, method in methods.items()}
    groups = defaultdict(lambda: defaultdict(list))
    for entry in Results(path).entries:
        method = methods.get(entry["method"])
        if (
            method
            and entry["model"] == model
            and entry["chunk"] == 1
            and entry["settings"] == method.settings
            and entry.get("codec") == codecs[entry["method"]]
        ):
            groups[entry["method"], entry["length"]][entry["text"]].append(
                {key: entry[key] for key in ("tokens", "nll", "dense_nll", "kl", "top1")}
            )
    table = []
    for (name, length), texts in groups.items():
        by_text = {text: summary(samples) for text, samples in sorted(texts.items())}
        count = len(by_text)
        logs = [
            (sample["nll"] - sample["dense_nll"]) / sample["tokens"]
            for samples in texts.values()
            for sample in samples
        ]
        error = stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
        ratios = torch.tensor([text["ppl_ratio"] for text in by_text.values()], dtype=torch.float64)
        context = max(length, SHORT_CONTEXT)
        size = methods[name].token_bytes(dense_bytes, context)
        table.append(
            {
                "method": name,
                "length": length,
                "evaluation_only": methods[name].evaluation_only,
                "bytes_per_token_and_head": round(size, 2),
                "compression": round(dense_bytes / size, 3),
                "ppl_ratio": round(ratios.log().mean().exp().item(), 5),
                "ppl_ratio_error": round(error, 5),
                "kl": round(sum(text["kl"] for text in by_text.values()) / count, 5),
                "top1": round(sum(text["top1"] for text in by_text.values()) / count, 4),
                "texts": by_text,
            }
        )
    return sorted(table, key=lambda row: (row["length"], row["compression"]))


def markdown(table: list[dict[str, object]]) -> str:
    """The rows as a README table."""
    lines = [
        "| cache | bytes | vs bf16 | ppl ratio | KL | top-1 | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        tokens = sum(text["tokens"] for text in row["texts"].values())
        cells = (
            row["method"],
            f"{row['bytes_per_token_and_head']:.1f}",
            f"{row['compression']:.2f}x",
            f"{row['ppl_ratio']:.4f} ± {row['ppl_ratio_error']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.3f}",
            f"{len(row['texts'])} texts, {tokens}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(
    path: Path, model: str, methods: dict[str, Method], shape: Shape, dtype: torch.dtype
) -> None:
    """Draw the picture beside ``path`` and print the table."""
    table = rows(path, model, methods, shape, dtype)
    print(markdown(table))
    draw([row for row in table if row["method"] != "dense"], path.with_suffix(".png"))


def draw(table: list[dict[str, object]], path: Path) -> None:
    """Perplexity ratio and KL over bytes, a marker per sample length; our best joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 5))
    lengths = sorted({row["length"] for row in table})
    rivals = sorted({row["method"] for row in table if not _is_ours(row)})
    for axis, metric, title in zip(
        axes, ("ppl_ratio", "kl"), ("perplexity ratio to dense", "KL to dense (nats)"), strict=True
    ):
        for length, marker in zip(lengths, "os^D*v" * len(lengths), strict=False):
            ours = [row for row in table if row["length"] == length and _is_ours(row)]
            for calibrated, line, kind in ((False, ":", "presets"), (True, "-", "calibrated")):
                points = [
                    (row["bytes_per_token_and_head"], row[metric])
                    for row in ours
                    if row["method"].endswith(CALIBRATED) == calibrated
                ]
                if points:
                    label = f"sparsekv {kind}, {length} tokens"
                    fill = "full" if calibrated else "none"
                    axis.plot(*zip(*points, strict=True), f"k{marker}", fillstyle=fill, label=label)
                    axis.plot(*zip(*_undominated(points), strict=True), f"k{line}")
            for row in table:
                if row["length"] == length and not _is_ours(row):
                    color = pyplot.cm.tab20(rivals.index(row["method"]))
                    shown = min(row[metric], WORST_RATIO) if metric == "ppl_ratio" else row[metric]
                    beyond = f" ({row[metric]:.2f})" if shown < row[metric] else ""
                    point = (row["bytes_per_token_and_head"], shown)
                    axis.plot(*point, marker, color=color, label=f"{row['method']}{beyond}")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.set_xlabel("bytes per token and KV head, window included")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].legend(
        *axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both coordinates, by the first one."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _is_ours(row: dict[str, object]) -> bool:
    return row["method"].startswith("sparsekv-")
