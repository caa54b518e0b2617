"""vLLM's configuration: what it says of the model and the engine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, VllmConfig, replace
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string


def forget_cache_dtype_of_checkpoint(vllm_config: VllmConfig) -> str | None:
    """Have the cache take the model's dtype where the checkpoint alone asks for another.

    vLLM resolves ``auto`` to what ModelOpt's configuration says; llm-compressor's scheme it takes
    up again in every layer.

    Returns:
        What the checkpoint asks for; None where it asks for nothing or the user for something else.
    """
    cache, quantization = vllm_config.cache_config, vllm_config.quant_config
    described = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    resolved = get_kv_cache_quant_algo_string(described) if isinstance(described, dict) else None
    if resolved not in (None, "auto") and cache.cache_dtype == resolved:
        cache.cache_dtype = "auto"
        return resolved
    if cache.cache_dtype == "auto" and getattr(quantization, "kv_cache_scheme", None):
        quantization.kv_cache_scheme = None
        return "fp8"
    return None


def lookahead_tokens(vllm_config: VllmConfig) -> int:
    """Draft tokens a step may write beyond the accepted ones."""
    return max(vllm_config.num_speculative_tokens, vllm_config.num_lookahead_tokens)


def set_admitted(vllm_config: VllmConfig) -> None:
    """Mark an engine's configuration and, with it, all that vLLM derives from it.

    They share its compilation configuration, where the layers of all of them register; the mark
    goes with it to other processes.
    """
    vllm_config.compilation_config.sparsekv_admitted = True


def is_admitted(vllm_config: VllmConfig) -> bool:
    """Whether this is an admitted engine's configuration, or one derived from it."""
    return getattr(vllm_config.compilation_config, "sparsekv_admitted", False)


def has_drafter(vllm_config: VllmConfig) -> bool:
    """Whether draft tokens come from attention layers of their own: EAGLE, MTP, a draft model."""
    speculative = vllm_config.speculative_config
    return speculative is not None and (speculative.use_eagle() or speculative.uses_draft_model())


def reads_first_group(vllm_config: VllmConfig) -> bool:
    """Whether model runner V1 shows the drafter the first cache group, whichever is its own."""
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and speculative.uses_draft_model()
        and not vllm_config.use_v2_model_runner
    )


def is_drafters(vllm_config: VllmConfig) -> bool:
    """Whether a configuration is the one that vLLM derives for a draft model."""
    speculative = vllm_config.speculative_config
    return speculative is not None and vllm_config.model_config is speculative.draft_model_config


def deselect_backend(vllm_config: VllmConfig) -> None:
    """Leave the attention backend of a derived configuration to the platform."""
    vllm_config.attention_config = replace(
        vllm_config.attention_config, backend=None, backend_per_kind={}
    )


def model_identity(vllm_config: VllmConfig) -> list[str]:
    """What tells a model from others: name, revision, configuration, quantisation, weights.

    Weights in a folder are known by their sizes and samples of their content, those of a hub by
    the commit.
    """
    model = vllm_config.model_config
    return [
        str(model.model),
        str(model.revision),
        str(model.quantization),
        model.hf_config.to_json_string(use_diff=False),
        *_weights_identity(model),
    ]


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """What keys and values follow from: name, revision, weights, configuration, dtype."""
    return {
        "model": str(model.model),
        "revision": model.revision,
        "weights": [str(model.quantization), *_weights_identity(model)],
        "configuration": _configuration(model),
        "dtype": str(model.dtype),
    }


def describe_drafter(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """The same of a drafter with attention layers, and what its cache was told to hold."""
    if not has_drafter(vllm_config):
        return None
    speculative = vllm_config.speculative_config
    described = describe_model(speculative.draft_model_config)
    return described | {"cache_dtype": str(speculative.kv_cache_dtype)}


def _weights_identity(model: ModelConfig) -> list[str]:
    if not Path(model.model).exists():
        return [str(getattr(model.hf_config, "_commit_hash", None))]
    return [_content(file) for file in _weight_files(model.model)]


def _configuration(model: ModelConfig) -> dict[str, Any]:
    """What the model's configuration says of what it computes."""
    text = model.hf_config.to_json_string(use_diff=False)
    configuration = json.loads(text)
    for name in ("_name_or_path", "transformers_version"):
        configuration.pop(name, None)
    if '"longrope"' in text:  # keys then depend on how many positions are served
        configuration["max_model_len"] = model.max_model_len
    return configuration


def settle_connector(vllm_config: VllmConfig) -> None:
    """Have vLLM turn ``--kv-offloading-size`` into a KV connector now; later it does so again."""
    vllm_config._post_init_kv_transfer_config()


def has_weights(vllm_config: VllmConfig) -> bool:
    """False if the model is a folder without weights."""
    model = vllm_config.model_config.model
    return not Path(model).exists() or bool(_weight_files(model))


def weight_bytes(model: ModelConfig) -> int | None:
    """Of a model's weights on disk; None for a model of a hub."""
    if not Path(model.model).exists():
        return None
    return sum(file.stat().st_size for file in _weight_files(model.model))


def _weight_files(model: str) -> list[Path]:
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in files if file.suffix in WEIGHT_FILES]


WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _content(path: Path, samples: int = 64, size: int = 1 << 14) -> str:
    length = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {length}".encode())
    with path.open("rb") as file:
        for index in range(samples):
            file.seek(max(0, length - size) * index // (samples - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def largest_position(vllm_config: VllmConfig) -> int:
    """Positions the model's configuration has; 0 where it does not say."""
    config = vllm_config.model_config.hf_text_config
    return getattr(config, "max_position_embeddings", None) or 0


def parse_engine_options(arguments: list[str], prog: str) -> dict[str, Any]:
    """vLLM's engine options of a command line that differ from their defaults."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    usage = "%(prog)s MODEL [options of this command and of `vllm serve`]"
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=prog, usage=usage))
    given, default = (EngineArgs.from_cli_args(parser.parse_args(line)) for line in (arguments, []))
    return changed_options(given, default)


def changed_options(engine_args: Any, default: Any) -> dict[str, Any]:
    """Fields of vLLM's ``EngineArgs`` that differ from ``default``'s."""
    names = [field.name for field in fields(default) if field.init]
    return {
        name: getattr(engine_args, name)
        for name in names
        if getattr(engine_args, name) != getattr(default, name)
    }
