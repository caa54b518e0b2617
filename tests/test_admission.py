"""Bad input is refused while vLLM builds its configuration, long before weights load."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODEL
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_sparsekv.engine import plugin
from vllm_sparsekv.engine.backend import SparseKVBackend
from vllm_sparsekv.engine.compat import check_version
from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import write_basis
from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import build

LLAMA = json.loads((MODEL / "config.json").read_text())


def configure(model: Path = MODEL, **options: Any) -> Any:
    """vLLM's configuration of an engine with sparse pages, as ``LLM()`` would build it."""
    uncalibrated = {"sparsekv": {"basis": "none"}}
    options = {
        "max_model_len": 1024,
        "attention_backend": "sparsekv",
        "additional_config": uncalibrated,
    } | options
    return EngineArgs(model=str(model), skip_tokenizer_init=True, **options).create_engine_config()


def model_folder(tmp_path: Path, **config: Any) -> Path:
    if config["model_type"] == "falcon":
        del config["head_dim"]  # which its configuration computes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"additional_config": {"sparsekv": {"key_sparsty": 0.5}}},
            r"sparsekv\.key_sparsty: unknown setting, did you mean 'key_sparsity'\? valid: \['pre",
        ),
        (
            {"additional_config": {"sparsekv": {"key_sparsity": 0.99}}},
            r"sparsekv\.key_sparsity=0\.99: leaves fewer than 4 of 64 .* <= 0\.9375",
        ),
        (
            {"additional_config": {"sparsekv": {"window": -1}}},
            r"sparsekv\.window=-1: must be an integer >= 0",
        ),
        (
            {"additional_config": {"sparse_kv": {"window": 0}}},
            r"additional_config\['sparse_kv'\]: did you mean 'sparsekv'\?",
        ),
        (
            {"additional_config": {"SparseKV": {"window": 0}}},
            r"additional_config\['SparseKV'\]: did you mean 'sparsekv'\?",
        ),
        (
            {"additional_config": {"preset": "capacity"}},
            r"additional_config\['preset'\]: did you mean additional_config\['sparsekv'\]\['pres",
        ),
        (
            {"additional_config": {"sparsekv": {}}, "attention_backend": None},
            r"additional_config\['sparsekv'\] is set but attention_backend=None: must be",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            r"kv_cache_dtype='fp8': must be 'auto' or the model's 'bfloat16' with",
        ),
        (
            {"kv_cache_dtype": "float16"},
            r"kv_cache_dtype=.float16.*bfloat16",  # vLLM 0.33 says so itself
        ),
        (
            {"kv_cache_dtype_skip_layers": ["0"]},
            r"has kv_cache_dtype_skip_layers set \(sparsekv\.skip_layers leaves layers dense\)",
        ),
        *(
            ({"additional_config": {"sparsekv": {"skip_layers": skip}}}, message)
            for skip, message in (
                (
                    [30],
                    r"sparsekv\.skip_layers=30: must be the index of an attention layer, one of",
                ),
                ([0, -31], r"sparsekv\.skip_layers=-31: .* from the end \(30 layers\)"),
                (["sliding"], r"skip_layers='sliding': the model has no such layers, .*\['full'\]"),
                (["full"], r"sparsekv\.skip_layers=\['full'\]: must leave one of the 30 attention"),
                (list(range(30)), r"must leave one of the 30 attention layers sparse"),
                (["slidin"], r"sparsekv\.skip_layers=\['slidin'\]: must be a list of indices and"),
                (3, r"sparsekv\.skip_layers=3: must be a list of indices and the words"),
                ([True], r"sparsekv\.skip_layers=\[True\]: must be a list of indices and the"),
            )
        ),
        ({"block_size": 24}, r"block_size=24: must be a positive multiple of 16"),
        ({"block_size": 1_000_000}, r"block_size=1000000: must be <= 1024, max_model_len"),
        (
            {
                "block_size": 16,
                "dtype": "float32",
                "additional_config": {
                    "sparsekv": {
                        "key_sparsity": 0.9,
                        "value_sparsity": 0.9,
                        "key_dtype": "fp8",
                        "value_dtype": "fp8",
                    }
                },
            },
            # 16 tokens of 2 * (8 + 8) bytes against a slot of 2 * 64 * 4 + 8.
            r"block_size=16: a page of 16 tokens x 32 bytes cannot hold one window slot of "
            r"520 bytes, must be >= 32",
        ),
        (
            {"disable_hybrid_kv_cache_manager": True},
            r"disable_hybrid_kv_cache_manager=True: must be False",
        ),
        (
            {"enable_sleep_mode": True},
            r"Sleep mode is not supported on current platform",  # vLLM says so itself on CPUs
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 216, "head_dim": 24}, r"head_size=24: must be a positive multiple of 16"),
        (
            {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"},
            r"encoder-decoder attention",
        ),
        (
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "hidden_size": 256,
                "kv_lora_rank": 64,
                "q_lora_rank": None,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 32,
                "head_dim": 32,
            },
            r"has multi-head latent attention \(MLA\), which is not supported",
        ),
        (
            {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
            r"has no attention layers",
        ),
        (
            {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": True},
            r"has ALiBi position biases",
        ),
        (
            {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_head": 9},
            r"has ALiBi position biases",
        ),
        (
            {
                "architectures": ["Llama4ForCausalLM"],
                "model_type": "llama4_text",
                "attention_chunk_size": 128,
            },
            r"has chunked local attention \(attention_chunk_size=128\)",
        ),
        (
            {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu"},
            r"has encoder-only attention",
        ),
    ],
)
def test_unsupported_models(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(model_folder(tmp_path, **(LLAMA | changes)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((30, 3, 32), "its head_size is 32 (calibrated on a-model), must be 64 for "),
        ((29, 3, 64), "its num_layers is 29 (calibrated on a-model), must be 30 for "),
        ((30, 1, 64), "its num_kv_heads is 1 (calibrated on a-model), must be 3 for "),
        (None, "must be a file written by sparsekv-calibrate, there is no such file"),
    ],
)
def test_basis_of_another_model(
    tmp_path: Path, shape: tuple[int, int, int] | None, message: str
) -> None:
    path = tmp_path / "basis.safetensors"
    if shape is not None:
        layers, heads, size = shape
        eyes, means = torch.eye(size).expand(2, heads, size, size), torch.zeros(2, heads, size)
        layer = LayerBasis(*eyes, *means, *means + 1)
        write_basis(path, dict.fromkeys(range(layers), layer), layers, "a-model")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        configure(additional_config={"sparsekv": {"basis": str(path)}})
    assert f"sparsekv.basis={str(path)!r}" in str(error.value)


def test_what_workers_read_is_checked_before_they_start(monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARSEKV_KERNELS", "foo")
    wanted = r"SPARSEKV_KERNELS='foo': must be one of \['reference', 'native'\]"
    with pytest.raises(ValueError, match=wanted):
        configure()


def test_native_kernels_that_cannot_be_had_are_refused(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKV_KERNELS", "native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    api.implementation.cache_clear()
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        configure(additional_config={"sparsekv": {"basis": "none"}})


def test_a_window_longer_than_any_request_is_cut() -> None:
    settings = {"window": 5000, "basis": "none"}
    config = configure(additional_config={"sparsekv": settings})
    assert config.additional_config["sparsekv"] == {"window": 1024, "basis": "none"}
    assert settings["window"] == 5000


def test_models_with_windows_sinks_and_states_are_admitted(tmp_path: Path) -> None:
    for index, changes in enumerate(
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0},
            {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
            {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"},
        )
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        config = configure(model_folder(folder, **(LLAMA | {"sliding_window": 64} | changes)))
        assert config.cache_config.block_size == 64


def test_context_parallelism_is_refused(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 64}
    folder = model_folder(tmp_path, **(LLAMA | heads))
    with pytest.raises(ValueError, match=r"context parallelism \(decode_context_parallel_size=2\)"):
        configure(folder, tensor_parallel_size=6, decode_context_parallel_size=2)


FP8_OF_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
FP8_OF_LLM_COMPRESSOR = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": SCHEME,
}


@pytest.mark.parametrize("described", [FP8_OF_MODELOPT, FP8_OF_LLM_COMPRESSOR])
def test_a_cache_dtype_of_the_checkpoint_gives_way(tmp_path: Path, described: dict) -> None:
    folder = model_folder(tmp_path, **(LLAMA | {"quantization_config": described}))
    config = configure(folder)
    assert config.cache_config.cache_dtype == "auto"
    assert getattr(config.quant_config, "kv_cache_scheme", None) is None
    with pytest.raises(ValueError, match=r"kv_cache_dtype='fp8': must be 'auto'"):
        configure(folder, kv_cache_dtype="fp8")


def test_the_model_s_own_dtype_is_auto() -> None:
    assert configure(kv_cache_dtype="bfloat16").cache_config.cache_dtype == "auto"


def test_block_size_defaults_to_64_and_respects_the_user() -> None:
    assert configure().cache_config.block_size == 64
    assert configure(block_size=128).cache_config.block_size == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_mla": True}, "MLA not supported"),
        ({"use_mm_prefix": True}, "partial multimodal token full attention not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"block_size": 40}, "block_size not supported"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability not supported"),
    ],
)
def test_layer_selection_gives_the_reason(changes: dict[str, Any], reason: str) -> None:
    layer = {
        "head_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 64,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
    }
    assert SparseKVBackend.validate_configuration(**layer) == []
    seen = {"has_sink": True, "has_sliding_window": True, "kv_cache_dtype": "bfloat16"}
    assert SparseKVBackend.validate_configuration(**(layer | seen)) == []
    assert SparseKVBackend.validate_configuration(**(layer | changes)) == [reason]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cpu"])
def test_supported_vllm_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.3", "0.34.0", "1.0.0"])
def test_unsupported_vllm_version_says_what_to_install(version: str) -> None:
    with pytest.raises(
        ImportError,
        match=rf"vllm {version} found, .*needs >=0.32,<0.34: pip install 'vllm>=0.32,<0.34'",
    ):
        check_version(version)


def test_registering_twice_changes_nothing() -> None:
    plugin.register()
    first = AttentionBackendEnum["SPARSEKV"]
    plugin.register()
    assert AttentionBackendEnum["SPARSEKV"] is first
    assert first.get_class() is SparseKVBackend


@pytest.mark.slow
def test_backend_choice_unpickles_in_a_process_without_the_plugin() -> None:
    plugin.register()
    pickled = pickle.dumps(AttentionBackendEnum["SPARSEKV"])
    code = f"import pickle; print(pickle.loads({pickled!r}).name)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == "SPARSEKV"
