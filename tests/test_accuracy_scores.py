"""Task files and the scores of answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality import scores, tasks  # noqa: E402


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"answers": ["a"]}', "field 'input' must be a string"),
        ('{"input": "q", "context": 1, "answers": ["a"]}', "field 'context' must be a string"),
        ('{"input": "q"}', "needs 'answers' or 'outputs'"),
        ('{"input": "q", "answers": []}', "needs 'answers' or 'outputs'"),
        ('{"input": "q", "outputs": [1]}', "needs 'answers' or 'outputs'"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, line, problem):
    path = tmp_path / "task.jsonl"
    path.write_text('{"input": "q", "context": "c", "answers": ["a"]}\n\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        tasks.read_jsonl(path)
    assert str(error.value).startswith(f"{path}:3: ") and problem in str(error.value)


def test_jsonl_of_both_kinds_and_the_empty_one(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        tasks.read_jsonl(path)
    path.write_text(
        '{"input":"q","context":"c","answers":["a"]}\n{"input":"q","outputs":["1","2"]}'
    )
    assert tasks.read_jsonl(path) == [
        tasks.Question("c\n\nq", ["a"], False),
        tasks.Question("q", ["1", "2"], True),
    ]


def test_scores_against_hand_computed_values():
    assert scores.exact_match("The Cat!", "cat") == 1
    assert scores.exact_match("a cat sat", "cat") == 0
    assert scores.token_f1("the red cat", "a red dog") == pytest.approx(0.5)
    assert scores.rouge_l("a b c d", "a x c") == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert scores.rouge_l("", "a") == scores.token_f1("", "a") == 0
    best = scores.score("it is Paris.", ["London", "Paris"])
    assert (best["exact_match"], best["contains"]) == (0, 1)
    assert best["f1"] == pytest.approx(0.5)
    assert scores.score("1 and 3", ["1", "2"], all_needed=True)["contains"] == 0.5
