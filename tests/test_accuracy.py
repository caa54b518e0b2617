"""The evaluator: its attention rule, its rivals, its metrics and its refusals."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.reference import sparse_attention
from vllm_sparsekv.kernels.pack.reference import pack
from vllm_sparsekv.kernels.window.reference import write_window
from vllm_sparsekv.settings import SparseKVConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy  # noqa: E402
from common import save  # noqa: E402
from quality import pareto, tasks  # noqa: E402
from quality.attention import RuleModel, rule_attention  # noqa: E402
from quality.methods import DENSE, Shape, build_methods, sparse  # noqa: E402
from quality.perplexity import (  # noqa: E402
    compare,
    dense_log_probabilities,
    summary,
    token_samples,
)
from quality.results import Results  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = Shape(head_size=64, num_kv_heads=2, num_layers=6)
METHODS = build_methods(SHAPE, torch.bfloat16)


class WordTokenizer:
    """One token per word: its length."""

    eos_token_id = 0

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def decode(self, tokens: list[int], **_) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(model_path) -> RuleModel:
    return RuleModel(str(model_path), torch.float32)


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize(("window", "window_dtype"), [(0, "auto"), (8, "auto"), (8, "int8")])
def test_rule_is_the_paged_reference_step_by_step(chunk, window, window_dtype):
    tokens, heads, kv_heads, size = 45, 4, 2, 32
    config = SparseKVConfig(0.375, 0.5, "int4", "int4", window, window_dtype)
    fmt = SparseFormat.from_config(config, size, torch.float32)
    query, key, value = vectors(3, tokens, heads, size).unbind()
    key, value = key[:, :kv_heads].contiguous(), value[:, :kv_heads].contiguous()
    pages = torch.full((4, kv_heads, 16, fmt.token_bytes), 255, dtype=torch.uint8)
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32)
    ring = torch.zeros(2, kv_heads, 8, fmt.slot_elements, dtype=fmt.window_dtype)
    ring_table = torch.tensor([[1]], dtype=torch.int32)
    expected = torch.full_like(query, torch.nan)
    for start in range(0, tokens, chunk):
        step = slice(start, min(start + chunk, tokens))
        count = step.stop - start
        arguments = (torch.tensor([0, count]), torch.tensor([step.stop]))
        slots = 16 + torch.arange(start, step.stop)
        pack(key[step], value[step], slots, pages, fmt)
        sparse_attention(
            query[step], key[step], value[step], pages, ring if window else None, *arguments, table,
            ring_table if window else None, size**-0.5, fmt, expected[step],
        )  # fmt: skip
        if window:
            write_window(key[step], value[step], ring, *arguments, slots, ring_table, fmt)
    method = sparse(config, size, torch.float32)
    by_head = [x.transpose(0, 1) for x in (query, key, value)]
    out = rule_attention(*by_head, method, torch.float32, size**-0.5, chunk).transpose(0, 1)
    assert (out - expected).abs().max() < 2e-6
    dense = rule_attention(*by_head, DENSE, torch.float32, size**-0.5).transpose(0, 1)
    assert (dense - expected).abs().max() > 1e-2


def test_dense_rule_is_the_model_itself(tiny, model_path):
    tokens = torch.arange(300) % 97
    plain = LlamaForCausalLM.from_pretrained(model_path).eval()
    with torch.inference_mode():
        expected = plain(tokens.unsqueeze(0)).logits[0]
    got = tiny.logits(tiny.hidden(tokens, DENSE))
    assert (got - expected).abs().max() < 1e-5
    assert tiny.shape == Shape(head_size=16, num_kv_heads=2, num_layers=2)


def test_compare_and_summary(tiny):
    tokens = torch.arange(60) * 7 % 97
    dense = dense_log_probabilities(tiny, tokens)
    hidden = tiny.hidden(tokens, DENSE)
    same = compare(tiny, tokens, dense, hidden)
    assert abs(same["kl"]) < 1e-5 and same["top1"] == same["tokens"] == 59
    other = compare(tiny, tokens, dense, -hidden)
    tested = tiny.logits(-hidden).log_softmax(-1)[:-1]
    kl = (dense[:-1].exp() * (dense[:-1] - tested)).sum()
    assert other["kl"] == pytest.approx(kl.item(), rel=1e-5) and kl > 1e-4
    assert other["nll"] == pytest.approx(-tested.gather(1, tokens[1:, None]).sum().item(), rel=1e-5)
    row = summary([same, other])
    assert row["ppl"] == pytest.approx(math.exp((same["nll"] + other["nll"]) / 118))
    assert row["ppl_ratio"] == pytest.approx(math.exp((other["nll"] - same["nll"]) / 118))
    assert row["top1"] == pytest.approx((59 + other["top1"]) / 118)


def test_texts_that_are_too_short(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("word " * 100)
    assert token_samples(WordTokenizer(), path, 6, 30, 20).shape == (3, 30)
    with pytest.raises(ValueError, match=r"text.txt: 100 tokens, shorter than one window of 128"):
        token_samples(WordTokenizer(), path, 6, 30, 128)
    with pytest.raises(ValueError, match=r"text.txt: 100 tokens, must be >= 200 for one sample"):
        token_samples(WordTokenizer(), path, 6, 200, 20)


def test_answers_are_greedy_and_scored(tiny, tmp_path):
    questions = [tasks.Question("some words of a prompt", ["zzz"], False)]
    prompt = torch.tensor(WordTokenizer()("some words of a prompt")["input_ids"])
    expected = []
    for _ in range(3):
        tokens = torch.cat([prompt, torch.tensor(expected, dtype=torch.long)])
        expected.append(tiny.logits(tiny.hidden(tokens, DENSE)[-1:]).argmax().item())
    got = tasks.generate(tiny, prompt, DENSE, 3, stop=-1)
    assert got == expected
    assert tasks.generate(tiny, prompt, DENSE, 3, stop=expected[0]) == []
    truth = WordTokenizer().decode(expected)
    questions.append(tasks.Question("some words of a prompt", [truth], False))
    run = (tiny, WordTokenizer(), {"dense": DENSE}, {Path("task.jsonl"): questions}, 3)
    rows = list(tasks.answer_files(*run, done=[]))
    assert [row["exact_match"] for row in rows] == [0, 1]
    assert list(tasks.answer_files(*run, done=rows[:1])) == rows[1:]
    (mean,) = tasks.means(rows, ("file", "method"), tasks.SCORES)
    assert mean == {"file": "task.jsonl", "method": "dense", "rows": 2} | dict.fromkeys(
        tasks.SCORES, 50
    )


def test_passkey_rows_say_what_greedy_decoding_finds(tiny):
    """A model of 97 tokens cannot know the key, unless the key is what it would say."""
    prompt, _ = tasks.passkey_prompt(WordTokenizer(), 60, 0.5, seed=0)
    said = tiny.logits(tiny.hidden(torch.tensor(prompt), DENSE)[-1:]).argmax().item()

    class Knowing(WordTokenizer):
        def __call__(self, text: str, **_) -> dict[str, list[int]]:
            if text.strip().isdigit():
                return {"input_ids": [said]}
            return super().__call__(text)

    run = (tiny, WordTokenizer(), {"dense": DENSE}, [60], [0.5])
    (row,) = tasks.passkey(*run, done=[])
    key = {"method": "dense", "length": 60, "depth": 0.5, "settings": {}}
    assert row == key | {"found": False}
    assert not list(tasks.passkey(*run, done=[row]))
    (row,) = tasks.passkey(tiny, Knowing(), {"dense": DENSE}, [60], [0.5], done=[])
    assert row["found"]


def test_rows_are_written_one_by_one(tmp_path):
    path = tmp_path / "rows.json"

    def rows(done):
        assert done == []
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy.stream(path, rows)
    assert accuracy.stream(path, lambda done: iter([{"b": len(done)}])) == [{"a": 1}, {"b": 1}]


def test_passkey_prompt_has_its_length_and_depth():
    tokenizer = WordTokenizer()
    needle = tokenizer(tasks.NEEDLE.format(key=12345))["input_ids"]
    for depth, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        prompt, answer = tasks.passkey_prompt(tokenizer, 400, depth, seed=1)
        assert 380 <= len(prompt) <= 400 and answer == [5]
        start = next(i for i in range(400) if prompt[i : i + len(needle)] == needle)
        assert start / (len(prompt) - len(needle)) == pytest.approx(share, abs=0.06)
    with pytest.raises(ValueError, match="length=5: must be >="):
        tasks.passkey_prompt(tokenizer, 5, 0.5, seed=1)


def evaluation(method: str, text: str, nll: float, **overrides) -> tuple[dict, dict]:
    key = {
        "model": "m",
        "dtype": "bfloat16",
        "text": text,
        "tokens_sha256": text,
        "length": 2048,
        "sample": 0,
        "chunk": 1,
        "method": method,
        "vector_bytes": METHODS[method].vector_bytes,
        "window": METHODS[method].window,
        "settings": METHODS[method].settings,
        "codec": METHODS[method].codec(SHAPE, torch.bfloat16),
    } | overrides
    return key, {"tokens": 100, "nll": nll, "dense_nll": 100.0, "kl": 2.0, "top1": 90}


def test_results_survive_and_resume(tmp_path):
    path = tmp_path / "accuracy.json"
    results = Results(path)
    key, sums = evaluation("sparsekv-balanced", "a", 101.0)
    assert not results.has(key)
    results.add(key, sums)
    again = Results(path)
    assert again.has(key) and not again.has(key | {"chunk": 64})
    assert not again.has(key | {"settings": {}})
    assert not again.has(key | {"codec": "00000000"})
    results.add(key | {"codec": "00000000"}, sums)
    assert [entry["codec"] for entry in Results(path).entries] == ["00000000"]
    del results.entries[0]["codec"]
    assert not results.has(key)
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{}")
    with pytest.raises(ValueError, match="accuracy.json: not a result file"):
        Results(path)


def test_undominated_points():
    points = [(64, 1.0), (56, 3.0), (56, 2.0), (50, 2.5), (72, 1.5)]
    assert pareto._undominated(points) == [(50, 2.5), (56, 2.0), (64, 1.0)]


def test_pareto_rows_and_picture(tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    results = Results(path)
    results.add(*evaluation("sparsekv-balanced", "a", 101.0))
    results.add(*evaluation("sparsekv-balanced", "b", 103.0))
    results.add(*evaluation("sparsekv-balanced", "c", 500.0, chunk=64))
    results.add(*evaluation("sparsekv-capacity", "a", 500.0, settings={"window": 1}))
    results.add(*evaluation("sparsekv-quality", "a", 500.0, codec="00000000"))
    results.add(*evaluation("turboquant-4", "a", 500.0, model="another"))
    key, sums = evaluation("turboquant-3", "a", 500.0)
    results.add({name: key[name] for name in key if name != "codec"}, sums)
    results.add(*evaluation("fp8", "a", 100.0, length=8192))
    pareto.write(path, "m", METHODS, SHAPE, torch.bfloat16)
    rows = pareto.rows(path, "m", METHODS, SHAPE, torch.bfloat16)
    assert [row["method"] for row in rows] == ["sparsekv-balanced", "fp8"]
    assert rows[0]["ppl_ratio"] == pytest.approx(math.exp(0.02), abs=1e-5)
    assert (rows[0]["kl"], rows[0]["top1"]) == (0.02, 0.9)
    assert rows[0]["compression"] == pytest.approx(256 / 63.71875, abs=1e-3)
    assert rows[1]["bytes_per_token_and_head"] == pytest.approx(128 + 64 * 264 / 8192, abs=0.01)
    assert (
        "| sparsekv-balanced | 63.7 | 4.02x | 1.0202 ± 0.0100 | 0.0200 | 0.900 | 2 texts, 200 |"
        in (capsys.readouterr().out)
    )
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_command_refuses_unknown_names(tmp_path, model_path):
    with pytest.raises(ValueError, match=r"text 'nope': must be a file or one of \['held-out'"):
        accuracy.find_texts(["nope"], tmp_path)
    with pytest.raises(ValueError, match=r"method 'nope': must be one of \['dense', 'fp8'"):
        accuracy.choose_methods(["nope"], SHAPE, torch.bfloat16)
    assert list(accuracy.choose_methods(["fp8"], SHAPE, torch.bfloat16)) == ["fp8"]
    task = tmp_path / "task.jsonl"
    task.write_text("{}\n")
    with pytest.raises(SystemExit, match=r"error: .*task.jsonl:1: field 'input'"):
        accuracy.main(
            ["tasks", str(task), "--model", str(model_path), "--out", str(tmp_path / "o")]
        )


def test_perplexity_command_resumes_and_reports(tmp_path, model_path, monkeypatch, capsys):
    text, out = tmp_path / "words.txt", tmp_path / "accuracy.json"
    text.write_text(" ".join(f"w{i * i % 97}" for i in range(400)))
    command = ["perplexity", "--model", str(model_path), "--texts", str(text), "--out", str(out)]
    command += ["--length", "200", "--samples", "6", "--methods", "dense", "mustafar-70"]
    before = Results.add
    left = 3

    def interrupted(self, key, sums):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        before(self, key, sums)

    monkeypatch.setattr(Results, "add", interrupted)
    with pytest.raises(SystemExit, match="accuracy.json holds what is done, run again to continue"):
        accuracy.main(command)
    assert len(json.loads(out.read_text())["evaluations"]) == 2
    capsys.readouterr()
    accuracy.main(command)
    printed = capsys.readouterr().out
    assert "words 1/6" not in printed and printed.count("words 2/6") == 2
    shape = RuleModel(str(model_path)).shape
    methods = build_methods(shape, torch.bfloat16)
    dense, ours = pareto.rows(out, model_path.name, methods, shape, torch.bfloat16)
    assert (dense["ppl_ratio"], dense["kl"], dense["top1"]) == (1, 0, 1)
    assert dense["texts"]["words"]["tokens"] == 398
    assert ours["method"] == "mustafar-70" and ours["kl"] > 0
    monkeypatch.setattr(RuleModel, "hidden", None)
    accuracy.main(command)


def test_results_have_a_line_a_measurement(tmp_path):
    path = tmp_path / "new" / "results.json"
    row = {"ms": {"median": 1 / 3, "p20": 0.25}, "list": [1, 2], "nan": math.nan}
    save(path, {"machine": {"cpu": "x"}, "rows": [row, row], 7: {"a": {"b": row}}})
    line = '{"ms": {"median": 0.3333333, "p20": 0.25}, "list": [1, 2], "nan": NaN}'
    assert path.read_text().splitlines() == [
        "{",
        ' "machine": {"cpu": "x"},',
        ' "rows": [',
        f"  {line},",
        f"  {line}",
        " ],",
        ' "7": {',
        '  "a": {',
        f'   "b": {line}',
        "  }",
        " }",
        "}",
    ]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(TypeError):
        save(path, {"rows": [object()]})
    assert json.loads(path.read_text())["rows"][0]["list"] == [1, 2]
