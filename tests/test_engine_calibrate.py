"""Calibration in vLLM's own engine: what it sees, what it writes, and when it runs by itself."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from engines import engine, generate, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_sparsekv.calibration.balance import layer_basis
from vllm_sparsekv.calibration.moments import Moments, head_grams
from vllm_sparsekv.engine import auto_basis
from vllm_sparsekv.engine.calibrate import calibrate, main, parse
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.kernels.cpu import build

pytestmark = pytest.mark.usefixtures("engines_in_process")

LENGTH, SAMPLES, CONTEXT = 64, 16, 2048
GOLDEN = (5**0.5 - 1) / 2
SHORT = {"calibration_tokens": 1024}
OPTIONS = {"max_model_len": CONTEXT, "kv_cache_memory_bytes": 1 << 28, "dtype": "float32"}


def calibrated(model: Path, output: Path, **arguments: Any) -> BasisFile:
    chosen = {"tokens": SAMPLES * LENGTH, "length": LENGTH} | arguments
    return calibrate({"model": str(model)} | OPTIONS, output, **chosen)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that knows a word a token."""
    folder = models.build("llama", tmp_path_factory.mktemp("llama"))
    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    words = Tokenizer(WordLevel(words, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words() -> list[int]:
    return torch.randint(
        3, models.VOCABULARY, (SAMPLES * LENGTH,), generator=torch.Generator().manual_seed(0)
    ).tolist()


def expected_layers(model: Path, samples: torch.Tensor) -> list[Moments]:
    """Moments of all layers as transformers computes them, samples all over the context."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[int, Moments] = {}

    def attention(module, query, key, value, mask, scaling, **kwargs):
        layer = found.setdefault(module.layer_idx, Moments.zeros(*key.shape[1::2]))
        parts = (x[0].transpose(0, 1) for x in (query, key, value))
        layer.observe(*parts, head_grams(module.o_proj.weight, key.shape[-1]), scaling)
        weights = (query @ key.repeat_interleave(2, 1).mT * scaling).masked_fill(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf
        )
        out = weights.softmax(-1) @ value.repeat_interleave(2, 1)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("observed", attention)
    hf.set_attn_implementation("observed")
    with torch.inference_mode():
        for index, tokens in enumerate(samples, 1):
            first = round((CONTEXT - LENGTH) * (index * GOLDEN % 1))
            positions = torch.arange(first, first + LENGTH).unsqueeze(0)
            hf.base_model(tokens.unsqueeze(0), position_ids=positions, use_cache=False)
    return [found[index] for index in sorted(found)]


def test_the_engine_sees_what_transformers_computes(llama, words, tmp_path):
    """So positions are spread over the context: else slow rotary planes seem never to turn."""
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{token}" for token in words))
    file = calibrated(llama, tmp_path / "basis.safetensors", texts=[text])
    assert file.model == llama.name and file.num_layers == 4
    assert dict(file.shapes) == {index: (2, 32) for index in range(4)}
    expected = expected_layers(llama, torch.tensor(words).view(SAMPLES, LENGTH))
    for index, moments in enumerate(expected):
        found, wanted = file.layer(index), layer_basis(moments, centred=True)
        for mean, like in zip(found[2:], wanted[2:], strict=True):
            assert (mean - like).abs().max() < 1e-3 * like.abs().max()
        # Axes have no sign, so the metric that each matrix gives is compared.
        for matrix, like in zip(found[:2], wanted[:2], strict=True):
            metric, like = matrix @ matrix.mT, (like @ like.mT).float()
            assert (metric - like).abs().max() < 1e-3 * like.abs().max()


def test_ranks_see_what_one_process_sees(llama, words, tmp_path, monkeypatch):
    """Four ranks that hold two KV heads twice, with half of their queries each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{token}" for token in words))
    files = []
    for ranks in (1, 4):
        options = OPTIONS | {"model": str(llama), "tensor_parallel_size": ranks}
        output = tmp_path / f"{ranks}.safetensors"
        files.append(calibrate(options, output, texts=[text], tokens=512, length=LENGTH))
    one, four = files
    for index in one.shapes:
        found, alone = four.layer(index), one.layer(index)
        for mean, like in zip(found[2:], alone[2:], strict=True):
            assert (mean - like).abs().max() < 1e-3 * like.abs().max()
        for matrix, like in zip(found[:2], alone[:2], strict=True):
            metric, like = matrix @ matrix.mT, like @ like.mT
            assert (metric - like).abs().max() < 2e-3 * like.abs().max()


def test_what_the_model_writes_itself_is_the_same_each_time(llama, tmp_path):
    first = calibrated(llama, tmp_path / "a.safetensors")
    again = calibrated(llama, tmp_path / "b.safetensors")
    other = calibrated(llama, tmp_path / "c.safetensors", tokens=8 * LENGTH)
    for index in first.shapes:
        mean, same, less = (file.layer(index).key_mean for file in (first, again, other))
        assert (mean - same).abs().max() < 1e-4 * mean.abs().max()
        assert (mean - less).abs().max() > 1e-2 * mean.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gemma4_text", "gpt_oss", "qwen3_next"])
def test_families(family, tmp_path):
    """Owners of caches alone have a basis, means only where attention allows them."""
    dtype = "bfloat16" if family == "qwen3_next" else "float32"
    model = models.build(family, tmp_path / "model")
    options = OPTIONS | {"model": str(model), "dtype": dtype}
    file = calibrate(options, tmp_path / "b.safetensors", tokens=8 * LENGTH, length=LENGTH)
    owners = {
        "gemma4_text": {0: (2, 32), 1: (2, 32), 2: (2, 64)},
        "qwen3_next": {1: (2, 32), 3: (2, 32)},
    }
    assert dict(file.shapes) == owners.get(family, {index: (2, 32) for index in range(4)})
    for index in file.shapes:
        layer = file.layer(index)
        assert bool(layer.key_mean.any()) == (family not in ("gemma2", "gpt_oss"))
        assert torch.linalg.cond(layer.key).max() > 1.5
    settings = {"preset": "balanced", "basis": str(file.path), "window": 0}
    skip = {"skip_tokenizer_init": True}
    with engine(settings, **options | skip) as llm:
        (answer,) = texts(generate(llm, [list(range(3, 90))], 8))
    assert len(answer) == 8


@pytest.fixture
def no_basis_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder with the kernels alone: the process that calibrates need not compile them."""
    build.library()
    kernels = build.cache_dir() / "kernels"
    if kernels.exists():
        shutil.copytree(kernels, tmp_path / "vllm_sparsekv" / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_auto_calibrates_once_and_says_so(llama, no_basis_yet, tmp_path, monkeypatch):
    # Samples are no longer than the model: eight of 127 tokens, written side by side.
    options = OPTIONS | {"model": str(llama), "skip_tokenizer_init": True, "max_model_len": 128}
    answers = []
    for _ in range(2):
        with engine(SHORT, **options) as llm:
            answers += texts(generate(llm, [list(range(3, 90))], 8))
            settings = llm.llm_engine.vllm_config.additional_config["sparsekv"]
    (path,) = (tmp_path / "vllm_sparsekv" / "basis").glob("*.safetensors")
    file = BasisFile.open(path)
    assert settings == SHORT | {"basis": str(path), "basis_sha256": file.sha256}
    assert answers[0] == answers[1]

    def calibrated_elsewhere(config: Any, context: int, tokens: int, output: Path) -> None:
        assert (context, tokens) == (256, SHORT["calibration_tokens"]) and output != path
        shutil.copy(path, output)

    monkeypatch.setattr(auto_basis, "_calibrate", calibrated_elsewhere)
    with engine(SHORT, **options | {"max_model_len": 256}) as llm:
        pass
    assert len(list(path.parent.glob("*.safetensors"))) == 2
    wrong = settings | {"basis_sha256": "0" * 64}
    with pytest.raises(ValueError, match=f"has sha256 {file.sha256}, must be 0000"):
        start_with(wrong, options)


def start_with(settings: dict[str, Any], options: dict[str, Any]) -> None:
    with engine(settings, **options):
        pass


def test_what_cannot_be_calibrated_is_served_uncalibrated(
    llama, no_basis_yet, tmp_path, monkeypatch
):
    """Dummy weights, and a calibration that dies: the reason is said, nothing is left behind."""
    options = OPTIONS | {"model": str(llama), "skip_tokenizer_init": True}
    with engine({}, **options | {"load_format": "dummy"}) as llm:
        settings = llm.llm_engine.vllm_config.additional_config["sparsekv"]
    assert settings == {"basis": "none"}
    monkeypatch.setattr(
        auto_basis, "PROGRAM", "import sys; sys.exit('Traceback ...\\nout of luck')"
    )
    with engine({"window": 8}, **options) as llm:
        settings = llm.llm_engine.vllm_config.additional_config["sparsekv"]
    assert settings == {"window": 8, "basis": "none"}
    assert not list(tmp_path.rglob("*.safetensors"))
    wanted = r"key_dtype='int4_int2'; .* cannot be calibrated: out of luck"
    with pytest.raises(ValueError, match=wanted):
        start_with({"key_dtype": "int4_int2"}, options)


def test_command(llama, words, tmp_path, capsys):
    text, output = tmp_path / "words.txt", tmp_path / "basis.safetensors"
    text.write_text(" ".join(f"w{token}" for token in words[:130]))
    command = [str(llama), "--text", str(text), "--output", str(output), "--length", "64"]
    engine_options = ["--max-model-len", "512", "--dtype", "float32"]
    engine_options += ["--kv-cache-memory-bytes", str(1 << 28)]
    main([*command, "--tokens", "129", *engine_options])
    assert f"{output}: 4 layers" in capsys.readouterr().out
    assert set(BasisFile.open(output).shapes) == {0, 1, 2, 3}
    before = output.read_bytes()
    with pytest.raises(SystemExit, match=r"words.txt: 130 tokens, must be >= 8192 \(--tokens\)"):
        main([*command, *engine_options])
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path / "nothing")])
    assert output.read_bytes() == before
    with pytest.raises(SystemExit):
        parse([*command, "--length", "1"])
    assert "--length 1: must be > 1 and <= 8192, a text's --tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([str(llama), "--output", "no/basis"])
    assert "--output no/basis: there is no folder no" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([str(llama), "--dtpye", "float32"])
    _, options = parse([str(llama), "--tensor-parallel-size", "2", "--quantization", "fp8"])
    assert options == {
        "model": str(llama),
        "tensor_parallel_size": 2,
        "quantization": "fp8",
    }


def test_the_process_that_calibrates_says_how_far_it_is(monkeypatch, caplog):
    """Its marked lines are logged, others are not; where it fails its last word is the reason."""
    program = (
        "import sys; assert sys.stdin.read() == 'task'\n"
        f"print('noise\\n{auto_basis.PROGRESS.decode()}sample 3/4', flush=True)\n"
        "sys.exit('Traceback ...\\nout of luck')"
    )
    monkeypatch.setattr(auto_basis, "PROGRAM", program)
    monkeypatch.setattr(auto_basis, "SECONDS_BETWEEN_LINES", 0)
    with (
        caplog.at_level(logging.INFO, logger=auto_basis.logger.name),
        pytest.raises(auto_basis.CannotCalibrate, match="^out of luck$"),
    ):
        auto_basis._run(b"task")
    assert caplog.messages == ["sparsekv: calibrating: sample 3/4"]
