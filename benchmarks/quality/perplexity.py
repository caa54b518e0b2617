"""Perplexity ratio, KL divergence and top-1 agreement of a cache to the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from quality.attention import RuleModel
from quality.methods import Method

TILE = 256
"""Positions whose logits are held at once."""


def token_samples(tokenizer, path: Path, count: int, length: int, window: int) -> torch.Tensor:
    """The first ``count`` runs of ``length`` tokens of a text, (count, length) int64.

    Raises:
        ValueError: the text is shorter than one window or than one sample.
    """
    tokens = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(tokens) <= window:
        raise ValueError(f"{path}: {len(tokens)} tokens, shorter than one window of {window}")
    if len(tokens) < length:
        raise ValueError(f"{path}: {len(tokens)} tokens, must be >= {length} for one sample")
    count = min(count, len(tokens) // length)
    return torch.tensor(tokens[: count * length]).view(count, length)


@torch.inference_mode()
def compare(
    model: RuleModel, tokens: torch.Tensor, reference: torch.Tensor, hidden: torch.Tensor
) -> dict[str, float]:
    """Sums over the predicted positions of one sample.

    Args:
        tokens: (n,) int64.
        reference: (n, hidden size) of the dense cache.
        hidden: (n, hidden size) of the cache under test.

    Returns:
        tokens, nll and dense_nll (nats), kl (nats, dense to tested), top1 (agreements).
    """
    sums = {"tokens": len(tokens) - 1, "nll": 0.0, "dense_nll": 0.0, "kl": 0.0, "top1": 0}
    for start in range(0, len(tokens) - 1, TILE):
        stop = min(start + TILE, len(tokens) - 1)
        target = tokens[start + 1 : stop + 1, None]
        dense = model.logits(reference[start:stop]).log_softmax(-1)
        tested = model.logits(hidden[start:stop]).log_softmax(-1)
        sums["dense_nll"] -= dense.gather(1, target).double().sum().item()
        sums["nll"] -= tested.gather(1, target).double().sum().item()
        sums["top1"] += int((dense.argmax(-1) == tested.argmax(-1)).sum())
        sums["kl"] += (dense.exp() * (dense - tested)).double().sum().item()
    return sums


def summary(samples: Iterable[dict[str, float]]) -> dict[str, float]:
    """Ratios of one text from the sums of its samples."""
    samples = list(samples)
    total = {key: sum(sample[key] for sample in samples) for key in samples[0]}
    count = total["tokens"]
    return {
        "tokens": count,
        "ppl": math.exp(total["nll"] / count),
        "ppl_ratio": math.exp((total["nll"] - total["dense_nll"]) / count),
        "kl": total["kl"] / count,
        "top1": total["top1"] / count,
    }


def evaluate(model: RuleModel, tokens: torch.Tensor, methods: dict[str, Method], chunk: int = 1):
    """Yield (name, sums) of each method on one sample; the dense pass is shared."""
    dense = Method(lambda key, query: key.float(), torch.Tensor.float, 0, 0)
    reference = model.hidden(tokens, dense, chunk)
    for name, method in methods.items():
        hidden = model.hidden(tokens, method, chunk)
        yield name, compare(model, tokens, reference, hidden)
