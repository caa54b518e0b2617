"""Standard metrics of answers to questions: exact match, token F1, ROUGE-L, containment."""

from __future__ import annotations

import re
import string
from collections import Counter


def normalise(text: str) -> list[str]:
    """Words in lower case without articles and punctuation, as SQuAD and LongBench count them."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, truth: str) -> float:
    return float(normalise(answer) == normalise(truth))


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the bags of words."""
    found, wanted = normalise(answer), normalise(truth)
    common = sum((Counter(found) & Counter(wanted)).values())
    return _harmonic(common, len(found), len(wanted))


def rouge_l(answer: str, truth: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004, beta = 1)."""
    found, wanted = answer.lower().split(), truth.lower().split()
    row = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for column, other in enumerate(wanted, 1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return _harmonic(row[-1], len(found), len(wanted))


def contains(answer: str, truth: str) -> float:
    """RULER's string match: the truth occurs in the answer, whatever the case."""
    return float(truth.lower() in answer.lower())


def score(answer: str, truths: list[str], all_needed: bool = False) -> dict[str, float]:
    """Best of several truths; ``all_needed`` averages containment over them (RULER)."""
    found = [contains(answer, truth) for truth in truths]
    return {
        "exact_match": max(exact_match(answer, truth) for truth in truths),
        "f1": max(token_f1(answer, truth) for truth in truths),
        "rouge_l": max(rouge_l(answer, truth) for truth in truths),
        "contains": sum(found) / len(found) if all_needed else max(found),
    }


def _harmonic(common: int, found: int, wanted: int) -> float:
    if common == 0:
        return 0.0
    precision, recall = common / found, common / wanted
    return 2 * precision * recall / (precision + recall)
