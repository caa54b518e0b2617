"""Passkey retrieval, and questions from LongBench- or RULER-format JSONL files."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from quality.attention import RuleModel
from quality.methods import Method
from quality.scores import score

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go, there and back. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"


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

    Returns:
        tokens of the prompt and of the answer.
    """
    key = str(random.Random(seed).randint(10_000, 99_999))
    needle, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (NEEDLE.format(key=key), QUESTION)
    )
    filler = tokenizer(FILLER, add_special_tokens=False)["input_ids"]
    room = length - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"length={length}: must be >= {length - room} tokens for a passkey")
    sentences = max(1, room // len(filler))
    before = round(sentences * depth)
    prompt = filler * before + needle + filler * (sentences - before) + question
    return prompt, tokenizer(f" {key}", add_special_tokens=False)["input_ids"]


def passkey(
    model: RuleModel, tokenizer, methods: dict[str, Method], lengths: list[int], depths: list[float]
) -> list[dict[str, object]]:
    """Whether greedy decoding gives the key back, per method, length and depth.

    One forward pass over prompt and key decides it: every token of the key must be the most likely
    one after those before it.
    """
    rows = []
    for length in lengths:
        for depth in depths:
            prompt, answer = passkey_prompt(tokenizer, length, depth, seed=hash((length, depth)))
            tokens = torch.tensor(prompt + answer)
            for name, method in methods.items():
                hidden = model.hidden(tokens, method)[len(prompt) - 1 : -1]
                found = model.logits(hidden).argmax(-1).tolist() == answer
                rows.append({"method": name, "length": length, "depth": depth, "found": found})
                print(f"passkey {length} tokens, depth {depth}, {name}: {found}", flush=True)
    return rows


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
) -> list[dict[str, object]]:
    """Mean scores per file and method, in percent."""
    rows = []
    for path, questions in files.items():
        for name, method in methods.items():
            totals: dict[str, float] = defaultdict(float)
            for number, question in enumerate(questions, 1):
                prompt = torch.tensor(tokenizer(question.prompt)["input_ids"])
                stop = tokenizer.eos_token_id
                tokens = generate(model, prompt, method, max_new_tokens, stop)
                answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                for metric, value in score(answer, question.truths, question.all_needed).items():
                    totals[metric] += value
                print(f"{path.name} {number}/{len(questions)} {name}: {answer!r}", flush=True)
            means = {metric: 100 * total / len(questions) for metric, total in totals.items()}
            rows.append({"file": path.name, "method": name, "questions": len(questions)} | means)
    return rows
