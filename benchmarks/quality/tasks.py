"""Passkey retrieval, and questions from LongBench- or RULER-format JSONL files."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from quality.attention import RuleModel
from quality.methods import Method
from quality.scores import score

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go, there and back. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"
SCORES = ("exact_match", "f1", "rouge_l", "contains")

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One line of a task file.

    Attributes:
        prompt: everything before the answer.
        truths: accepted answers (LongBench ``answers``) or strings that must all occur
            (RULER ``outputs``).
        all_needed: whether all truths are needed.
    """

    prompt: str
    truths: list[str]
    all_needed: bool


def read_jsonl(path: Path) -> list[Question]:
    """Questions of a file: ``input``, optionally ``context``, and ``answers`` or ``outputs``.

    Raises:
        ValueError: a line is not JSON or lacks a field; names the file, the line and the field.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from error
        questions.append(_question(record, f"{path}:{number}"))
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _question(record: object, where: str) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object")
    if not isinstance(record.get("input"), str):
        raise ValueError(f"{where}: field 'input' must be a string")
    context = record.get("context", "")
    if not isinstance(context, str):
        raise ValueError(f"{where}: field 'context' must be a string")
    name = "answers" if "answers" in record else "outputs"
    truths = record.get(name)
    if not (isinstance(truths, list) and truths and all(isinstance(t, str) for t in truths)):
        raise ValueError(f"{where}: needs 'answers' or 'outputs', a list of strings, not empty")
    prompt = f"{context}\n\n{record['input']}" if context else record["input"]
    return Question(prompt, truths, all_needed=name == "outputs")


def passkey_prompt(tokenizer, length: int, depth: float, seed: int) -> tuple[list[int], list[int]]:
    """A needle in filler of about ``length`` tokens, ``depth`` of the way in.

    It starts as the tokenizer starts a text.

    Returns:
        tokens of the prompt and of the answer.
    """
    key = str(random.Random(seed).randint(10_000, 99_999))
    needle, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (NEEDLE.format(key=key), QUESTION)
    )
    start = tokenizer("")["input_ids"]
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    room = length - len(start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"length={length}: must be >= {length - room} tokens for a passkey")
    sentences = max(1, room // len(filler))
    before = round(sentences * depth)
    prompt = start + filler * before + needle + filler * (sentences - before) + question
    return prompt, tokenizer(f" {key}", add_special_tokens=False)["input_ids"]


def passkey(
    model: RuleModel,
    tokenizer,
    methods: dict[str, Method],
    lengths: list[int],
    depths: list[float],
    done: list[Row],
) -> Iterator[Row]:
    """Whether greedy decoding gives the key back, per method, length and depth.

    One forward pass over prompt and key decides it: every token of the key must be the most likely
    one after those before it. Rows in ``done`` are not computed again.
    """
    for length, depth in product(lengths, depths):
        prompt, answer = passkey_prompt(tokenizer, length, depth, length + round(1000 * depth))
        tokens = torch.tensor(prompt + answer)
        for name, method in methods.items():
            key = {"method": name, "length": length, "depth": depth, "settings": method.settings}
            if _is_done(key, done):
                continue
            hidden = model.hidden(tokens, method)[len(prompt) - 1 : -1]
            yield key | {"found": model.logits(hidden).argmax(-1).tolist() == answer}


def generate(
    model: RuleModel, prompt: torch.Tensor, method: Method, count: int, stop: int
) -> list[int]:
    """Greedy tokens after ``prompt``; each is a full forward pass, so it is exact and slow."""
    tokens = prompt
    for _ in range(count):
        token = model.logits(model.hidden(tokens, method)[-1:]).argmax(-1)
        if token.item() == stop:
            break
        tokens = torch.cat([tokens, token])
    return tokens[len(prompt) :].tolist()


def answer_files(
    model: RuleModel,
    tokenizer,
    methods: dict[str, Method],
    files: dict[Path, list[Question]],
    max_new_tokens: int,
    done: list[Row],
) -> Iterator[Row]:
    """One row per question and method: the answer and its scores. Skips rows in ``done``."""
    for path, questions in files.items():
        for (number, question), (name, method) in product(enumerate(questions, 1), methods.items()):
            key = {"file": path.name, "question": number, "prompt": question.prompt[-80:]}
            key |= {"method": name, "settings": method.settings}
            if _is_done(key, done):
                continue
            prompt = torch.tensor(tokenizer(question.prompt)["input_ids"])
            tokens = generate(model, prompt, method, max_new_tokens, tokenizer.eos_token_id)
            answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            result = score(answer, question.truths, question.all_needed)
            yield key | {"answer": answer} | result


def means(rows: list[Row], by: tuple[str, ...], metrics: tuple[str, ...]) -> list[Row]:
    """Means of the metrics over the rows that agree in the columns ``by``, in percent."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in by)].append(row)
    return [
        dict(zip(by, group, strict=True))
        | {"rows": len(members)}
        | {m: round(100 * sum(row[m] for row in members) / len(members), 2) for m in metrics}
        for group, members in groups.items()
    ]


def _is_done(key: Row, done: list[Row]) -> bool:
    return any(key.items() <= row.items() for row in done)
