"""Write the tables of the README and the benchmarks' page that follow from ``benchmarks/results``.

``python benchmarks/tables.py`` fills what is between ``<!-- table NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "pages" / "benchmarks.md")
MODELS = {"SmolLM2-135M": "smollm2-135m-instruct", "Gemma-3-270M": "gemma-3-270m"}


def read(name: str) -> dict[str, Any]:
    """A file of results, without its suffix."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head, empty cells stay narrow."""
    lines = [re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(row)} |") for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


CACHES = {
    "dense": "dense bf16",
    "50 % auto": "50 % auto",
    "50 % fp8": "50 % fp8",
    "quality": "preset quality",
    "balanced": "preset balanced (default)",
    "int4_int2 keys, int3 values": "int4_int2 keys, int3 values",
    "int3 keys and values": "int3 keys and values",
    "capacity": "preset capacity",
    "int3 keys, int2 values": "int3 keys, int2 values",
    "balanced, first and last two layers dense": "balanced, first and last two layers dense",
}
"""Name in the results, and in the table."""


def capacity() -> str:
    """Tokens of 1 GiB by cache, and how many times the dense cache's."""
    head = ["cache"]
    rows = [[title] for title in CACHES.values()]
    for title, model in MODELS.items():
        head += [title, "against dense"]
        tokens = read(f"capacity_{model}")["tokens"]
        for row, cache in zip(rows, CACHES, strict=True):
            row += [f"{tokens[cache]:,}", f"{tokens[cache] / tokens['dense']:.2f}x"]
    return markdown([head, *rows])


METHODS = {
    "fp8": "fp8",
    "Mustafar 50 %, bf16": "mustafar-50",
    "preset sparse-50": "sparsekv-sparse-50",
    "**preset safe (default without a basis)**": "sparsekv-safe",
    "int4 per token and head, rotated": "int4-token-head",
    "NVFP4": "nvfp4",
    "UltraQuant 4-bit, as shipped": "ultraquant_4bit",
    "TurboQuant 4-bit": "turboquant-4",
    "TurboQuant 4-bit, as shipped": "turboquant_4bit_nc",
    "**preset quality**": "sparsekv-quality-calibrated",
    "KVarN K4V2": "kvarn_k4v2_g128",
    "TurboQuant K 4-bit, V 3-bit": "turboquant-k4v3",
    "balanced, uncalibrated": "sparsekv-balanced",
    "**preset balanced (default)**": "sparsekv-balanced-calibrated",
    "**int4_int2 keys, int3 values**": "sparsekv-int4_int2-int3-calibrated",
    "TurboQuant 3-bit": "turboquant-3",
    "**int3 keys and values**": "sparsekv-int3-int3-calibrated",
    "**preset capacity**": "sparsekv-capacity-calibrated",
    "capacity, window of 64 in 16 bits": "sparsekv-capacity-window-16-bit-calibrated",
    "H2O, a fifth of all tokens": "h2o-20",
    "H2O on sparse-50": "h2o-20-sparsekv-sparse-50",
    "H2O on balanced": "h2o-20-sparsekv-balanced-calibrated",
}


def _quality(name: str, method: str, head_size: int) -> list[str]:
    """Bytes against bfloat16, perplexity ratio with its error over texts, KL; blank if unmeasured.

    The window's bytes are spread over a context of 4,096 tokens.
    """
    texts = [entry for entry in read(name)["evaluations"] if entry["method"] == method]
    if not texts:
        return [""] * 3
    losses = [(text["nll"] - text["dense_nll"]) / text["tokens"] for text in texts]
    ratio, kl = math.exp(mean(losses)), mean(text["kl"] / text["tokens"] for text in texts)
    error = ratio * stdev(losses) / len(losses) ** 0.5
    return [
        f"{4 * head_size / texts[0]['token_bytes']:.2f}x",
        f"{ratio:.4f} +- {error:.4f}",
        f"{kl:.4f}",
    ]


def quality() -> str:
    """What every cache loses on both models, a sample of each held-out text."""
    head = ["cache"]
    rows = [[title] for title in METHODS]
    for title, name, head_size in (("SmolLM2", "accuracy", 64), ("Gemma", "accuracy_gemma", 256)):
        head += [f"{title}, against bf16", "perplexity ratio", "KL"]
        for row, method in zip(rows, METHODS.values(), strict=True):
            row += _quality(name, method, head_size)
    return markdown([head, *rows])


OVERVIEW = {
    "fp8": ("fp8", None),
    "Mustafar 50 %, bf16": ("mustafar-50", None),
    "NVFP4": ("nvfp4", None),
    "TurboQuant 4-bit": ("turboquant-4", None),
    "KVarN K4V2": ("kvarn_k4v2_g128", None),
    "TurboQuant K 4-bit, V 3-bit": ("turboquant-k4v3", None),
    "TurboQuant 3-bit": ("turboquant-3", None),
    "**`sparse-50`**": ("sparsekv-sparse-50", "50 % fp8"),
    "**`safe`** (default without a basis)": ("sparsekv-safe", None),
    "**`quality`**": ("sparsekv-quality-calibrated", "quality"),
    "**`balanced`** (default)": ("sparsekv-balanced-calibrated", "balanced"),
    "**`capacity`**": ("sparsekv-capacity-calibrated", "capacity"),
}
"""Title: its method, and its name among the capacities."""


def overview() -> str:
    """What every cache loses and holds on both models."""
    head, dense = ["cache"], ["dense bf16"]
    rows = [[title] for title in OVERVIEW]
    results = (("accuracy", 64), ("accuracy_gemma", 256))
    for (title, model), (name, head_size) in zip(MODELS.items(), results, strict=True):
        tokens = read(f"capacity_{model}")["tokens"]
        head += [f"{title}, against bf16", "tokens", "ratio", "KL"]
        dense += ["1.00x", f"{tokens['dense']:,}", "1", "0"]
        for row, (method, cache) in zip(rows, OVERVIEW.values(), strict=True):
            size, ratio, kl = _quality(name, method, head_size)
            row += [size, f"{tokens[cache]:,}" if cache else "", ratio.partition(" ")[0], kl]
    return markdown([head, dense, *rows])


CODECS = {
    "50 % auto": "50 % auto",
    "50 % fp8": "50 % fp8",
    "30/50 % int4": "30/50 % int4",
    "int4/int3": "int4, int3 (balanced)",
    "int4_int2/int3": "int4_int2, int3",
    "int3/int2": "int3, int2",
}


def kernels(name: str, codecs: Sequence[str]) -> str:
    """Speed-ups of decode attention: a row a shape, contexts within a cell."""
    contexts = ("512", "2048", "8192", "32768")
    rows = [["speed-up at context 512 / 2k / 8k / 32k", *(CODECS[codec] for codec in codecs)]]
    for shape, curve in read(name)["decode"].items():
        found = re.fullmatch(r"D=(\d+) (\w+) batch=8", shape)
        assert found, shape
        cells = (
            " / ".join(f"{curve[length][codec]['speedup']['median']:.2f}" for length in contexts)
            for codec in codecs
        )
        rows.append([f"head size {found[1]}, {found[2]}", *cells])
    return markdown(rows)


def _ratio(measured: dict[str, Any], key: str) -> str:
    return f"{measured[key]['ratio']['median']:.2f}x" if key in measured else ""


def _shape(key: str) -> str:
    batch, context = key.split(" x ")
    return f"{batch} x {int(context):,}"


PROMPTS = ("512", "2048", "7680")
TO_REACH = {
    "4 x 128": 1.0,
    "4 x 512": 1.1,
    "8 x 1024": 1.3,
    "4 x 4096": 1.8,
    "4 x 7680": 2.0,
} | dict.fromkeys(PROMPTS, 1.0)
TO_REACH_AMX = (
    {f"{batch} x 128": 0.95 for batch in (1, 4, 8, 32)}
    | {f"{batch} x {context}": 1.3 for batch in (1, 4, 8) for context in (2048, 4096, 7680)}
    | dict.fromkeys(PROMPTS, 1.0)
)


def steps(names: dict[str, str], to_reach: dict[str, float]) -> str:
    """Decode steps and first tokens: a row for each result, by title."""
    found = {title: read(f"step_{name}") for title, name in names.items()}
    shapes = [*next(iter(found.values()))["decode"]]
    goals = (to_reach.get(key) for key in (*shapes, *PROMPTS))
    rows = [
        ["", *map(_shape, shapes), *(f"first of {int(tokens):,}" for tokens in PROMPTS)],
        ["to reach", *("" if goal is None else f"{goal}x" for goal in goals)],
    ]
    rows += [
        [
            title,
            *(_ratio(measured["decode"], key) for key in shapes),
            *(_ratio(measured["first_token"], key) for key in PROMPTS),
        ]
        for title, measured in found.items()
    ]
    return markdown(rows)


def steps_avx512() -> str:
    """Those of both models on the machine with AVX-512."""
    names = {
        "SmolLM2-135M, bfloat16": "smollm2_bf16_avx512",
        "SmolLM2-135M, float32": "smollm2_float32_avx512",
        "Gemma-3-270M, bfloat16": "gemma_bf16_avx512",
    }
    return steps(names, TO_REACH)


def steps_amx() -> str:
    """Those of both models on the machine with AMX."""
    names = {"SmolLM2-135M": "smollm2_bf16_amx", "Gemma-3-270M": "gemma_bf16_amx"}
    return steps(names, TO_REACH_AMX)


def layer() -> str:
    """Where the time of a layer's decode step goes."""
    found = read("layer")["microseconds"]
    parts = [*next(iter(found.values()))]
    rows = [["microseconds a layer", "vLLM's own", "ours", *parts[2:]]]
    rows += [[_shape(key), *(f"{row[part]:.0f}" for part in parts)] for key, row in found.items()]
    return markdown(rows)


def steps_avx2() -> str:
    """Decode steps and first tokens of Gemma-3-270M on the machine with AVX2."""
    found = read("step_gemma_float32_avx2")
    decode, first = found["decode"], found["first_token"]
    head = ["requests x context", *map(_shape, decode), "first token of 512", "of 2,048"]
    cells = [_ratio(decode, key) for key in decode] + [_ratio(first, key) for key in first]
    return markdown([head, ["Gemma-3-270M", *cells]])


def transfer() -> str:
    """Prompts read from files against prompts computed, and what keeping pages costs."""
    found = read("transfer")
    restore, size = found["restore"], found["bytes"]

    def row(title: str, measured: dict[str, float], unit: str, scale: float = 1) -> list[str]:
        median, low, high = (measured[name] / scale for name in ("median", "p20", "p80"))
        return [title, f"{median:.2f} {unit}", f"{low:.2f} to {high:.2f}"]

    tokens = f"{found['arguments']['tokens']:,}"
    rows = [
        ["", "median", "p20 to p80"],
        row(f"first token of {tokens}, computed", restore["computed_ms"], "s", 1e3),
        row(f"first token of {tokens}, read from files", restore["restored_ms"], "s", 1e3),
        row("computed over read", restore["ratio"], "x"),
        row("computed, kept over without", found["first_token"]["ratio"], "x"),
        row("decode step, kept over without", found["decode"]["ratio"], "x"),
        ["bytes of files over bytes of pages", f"{size['ratio']:.4f}", ""],
    ]
    return markdown(rows)


LATEST = ("50 % auto", "50 % fp8", "30/50 % int4", "int4/int3", "int4_int2/int3")
TABLES: dict[str, Callable[[], str]] = {
    "overview": overview,
    "capacity": capacity,
    "quality": quality,
    "kernels": lambda: kernels("kernels", LATEST),
    "kernels_avx512": lambda: kernels("kernels_avx512", (*LATEST[:-1], "int3/int2")),
    "kernels_xeon": lambda: kernels("kernels_xeon", LATEST),
    "steps_avx512": steps_avx512,
    "layer": layer,
    "steps_amx": steps_amx,
    "steps_avx2": steps_avx2,
    "transfer": transfer,
}


def fill(page: str) -> str:
    """The page with every table as the results have it.

    Raises:
        KeyError: a marker names no table.
    """
    return re.sub(
        r"(<!-- table (\w+) -->\n\n).*?(\n\n<!-- end -->)",
        lambda found: found[1] + TABLES[found[2]]() + found[3],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
