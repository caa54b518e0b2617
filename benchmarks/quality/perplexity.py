"""Perplexity ratio, KL divergence and top-1 agreement of a cache to the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from quality.attention import RuleModel
from quality.methods import DENSE

TILE = 256
"""Positions whose logits are held at once."""


def token_samples(tokenizer, path: Path, count: int, length: int, window: int) -> torch.Tensor:
    """The first ``count`` runs of ``length`` tokens of a text, (count, length) int64.

    Each starts as the tokenizer starts a text.

    Raises:
        ValueError: the text is shorter than one window or than one sample.
    """
    start = tokenizer("")["input_ids"]
    tokens = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"][len(start) :]
    if len(tokens) <= window:
        raise ValueError(f"{path}: {len(tokens)} tokens, shorter than one window of {window}")
    each = length - len(start)
    if len(tokens) < each:
        raise ValueError(f"{path}: {len(tokens)} tokens, must be >= {each} for one sample")
    count = min(count, len(tokens) // each)
    return torch.tensor([start + tokens[i * each : (i + 1) * each] for i in range(count)])


@torch.inference_mode()
def compare(
    model: RuleModel, tokens: torch.Tensor, dense: torch.Tensor, hidden: torch.Tensor
) -> dict[str, float]:
    """Sums over the predicted positions of one sample.

    Args:
        tokens: (n,) int64.
        dense: (n, vocabulary) float32, log-probabilities with the dense cache.
        hidden: (n, hidden size) with the cache under test.

    Returns:
        tokens, nll and dense_nll (nats), kl (nats, dense to tested), top1 (agreements).
    """
    sums = {"tokens": len(tokens) - 1, "nll": 0.0, "dense_nll": 0.0, "kl": 0.0, "top1": 0}
    for start in range(0, len(tokens) - 1, TILE):
        stop = min(start + TILE, len(tokens) - 1)
        target = tokens[start + 1 : stop + 1, None]
        expected = dense[start:stop]
        tested = model.logits(hidden[start:stop]).log_softmax(-1)
        sums["dense_nll"] -= expected.gather(1, target).double().sum().item()
        sums["nll"] -= tested.gather(1, target).double().sum().item()
        sums["top1"] += int((expected.argmax(-1) == tested.argmax(-1)).sum())
        sums["kl"] += (expected.exp() * (expected - tested)).sum(-1).double().sum().item()
    return sums


def dense_log_probabilities(model: RuleModel, tokens: torch.Tensor) -> torch.Tensor:
    """(n,) int64 -> (n, vocabulary) float32 with the dense cache."""
    hidden = model.hidden(tokens, DENSE)
    return torch.cat([model.logits(tile).log_softmax(-1) for tile in hidden.split(TILE)])


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
