"""What an engine must look like to run on sparse pages, checked before weights load."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_sparsekv.engine.auto_basis import CannotCalibrate, find_or_calibrate
from vllm_sparsekv.engine.compat import (
    VllmConfig,
    deselect_backend,
    forget_cache_dtype_of_checkpoint,
    has_drafter,
    init_logger,
    is_drafters,
    lookahead_tokens,
)
from vllm_sparsekv.engine.plugin import BACKEND_NAME
from vllm_sparsekv.engine.transfer.connectors import check_connector, prepare_connector
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.api import check_environment, implementation
from vllm_sparsekv.settings import SETTING_NAMES, SparseKVConfig

SETTINGS_KEY = "sparsekv"
ALIBI_MODELS = ("bloom", "step1")
"""Besides those whose configuration has a flag for it."""

logger = init_logger("vllm.sparsekv")  # below "vllm", so that vLLM's handlers print it


def settings_of(vllm_config: VllmConfig) -> SparseKVConfig:
    """The user's validated settings, ``additional_config["sparsekv"]``.

    Raises:
        ValueError: names the field, the value and the valid set.
    """
    given = _additional(vllm_config)
    for name in given:
        if name != SETTINGS_KEY and difflib.get_close_matches(str(name).lower(), [SETTINGS_KEY]):
            raise ValueError(f"additional_config[{name!r}]: did you mean {SETTINGS_KEY!r}?")
        if name in SETTING_NAMES:
            raise ValueError(
                f"additional_config[{name!r}]: did you mean "
                f"additional_config[{SETTINGS_KEY!r}][{name!r}]?"
            )
    return SparseKVConfig.from_dict(given.get(SETTINGS_KEY))


def refuse_unused_settings(vllm_config: VllmConfig) -> None:
    """Refuse settings for sparse pages on an engine that uses another attention backend."""
    if SETTINGS_KEY in _additional(vllm_config):
        raise ValueError(
            f"additional_config[{SETTINGS_KEY!r}] is set but attention_backend="
            f"{vllm_config.attention_config.backend}: must be 'sparsekv'"
        )


def drafter_settings(vllm_config: VllmConfig) -> SparseKVConfig:
    """The same for layers of a drafter: the basis is the target's.

    Raises:
        ValueError: a codec needs a basis.
    """
    given = _additional(vllm_config).get(SETTINGS_KEY) or {}
    return SparseKVConfig.from_dict({**given, "basis": "none"})


def layer_format(vllm_config: VllmConfig, head_size: int, of_drafter: bool = False) -> SparseFormat:
    """The cache format of a layer with this head size."""
    return SparseFormat.from_config(
        (drafter_settings if of_drafter else settings_of)(vllm_config),
        head_size,
        vllm_config.model_config.dtype,
        lookahead_tokens(vllm_config),
    )


def admit(vllm_config: VllmConfig) -> None:
    """Refuse what sparse pages do not support and choose the block size.

    Raises:
        ValueError: names the field, the value and the valid set.
        BuildError: ``SPARSEKV_KERNELS=native`` and they cannot be built.
    """
    settings = settings_of(vllm_config)
    model = vllm_config.model_config
    if model is None:
        return
    check_connector(vllm_config)
    for what in unsupported(vllm_config):
        raise ValueError(
            f"attention_backend=sparsekv: {model.model} has {what}, which is not supported"
        )
    _check_cache_dtype(vllm_config)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "disable_hybrid_kv_cache_manager=True: must be False with attention_backend=sparsekv, "
            "pages and window are two cache groups"
        )
    _check_drafter(vllm_config)
    if settings.window > model.max_model_len:
        logger.info(
            "sparsekv: window %s is longer than any request, %s (max_model_len) does as well",
            settings.window,
            model.max_model_len,
        )
        _settle(vllm_config, window=model.max_model_len)
    if check_environment() == "native":
        implementation(vllm_config.device_config.device_type)
    _settle_block_size(vllm_config)
    _check_skip_layers(settings.skip_layers, vllm_config)
    if settings.basis == "auto" and settings.takes_basis:
        _find_basis(vllm_config)
        _settle_block_size(vllm_config)
    elif settings.basis_path is not None:
        found = _check_basis(settings.basis_path, settings.basis_sha256, model)
        _settle(vllm_config, basis_sha256=found.sha256)
    prepare_connector(vllm_config, settings_of(vllm_config))


def admit_derived(vllm_config: VllmConfig) -> None:
    """Leave a drafter dense that sparse pages do not support; vLLM derives its configuration."""
    if is_drafters(vllm_config) and any(unsupported(vllm_config)):
        deselect_backend(vllm_config)


def unsupported(vllm_config: VllmConfig) -> Iterator[str]:
    """What the model has, or the engine asks of it, that sparse pages cannot do."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    if model.use_mla:
        yield "multi-head latent attention (MLA)"
    if model.is_encoder_decoder:
        yield "encoder-decoder attention"
    if model.attn_type == "encoder_only":
        yield "encoder-only attention"
    if model.is_attention_free:
        yield "no attention layers"
    if getattr(text, "alibi", False) or text.model_type in ALIBI_MODELS:
        yield "ALiBi position biases"
    if model.attention_chunk_size is not None:
        yield f"chunked local attention (attention_chunk_size={model.attention_chunk_size})"
    if model.rswa_window is not None:
        yield "reference sliding-window attention"
    if model.is_mm_prefix_lm:
        yield (
            "bidirectional attention within images (--limit-mm-per-prompt '{\"image\": 0}' and the "
            "like for its other modalities serves it as a text model)"
        )
    if getattr(text, "param_sink_number", 0):
        yield "learnt sink tokens (param_sink_number)"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"context parallelism ({name}={getattr(parallel, name)})"
    if vllm_config.cache_config.kv_cache_dtype_skip_layers:
        yield "kv_cache_dtype_skip_layers set (sparsekv.skip_layers leaves layers dense)"


def layer_kinds(vllm_config: VllmConfig) -> list[str] | None:
    """By decoder layer "full", "sliding" or "state"; None where the configuration does not say."""
    model = vllm_config.model_config
    text = model.hf_text_config
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if types is None and not model.is_hybrid:
        sliding = vllm_config.cache_config.sliding_window is not None
        return ["sliding" if sliding else "full"] * model.get_total_num_hidden_layers()
    if types is None:
        return None
    kinds = {"sliding_attention": "sliding", "full_attention": "full", "attention": "full"}
    return [kinds.get(layer_type, "state") for layer_type in types]


def _check_skip_layers(skip: Sequence[int | str], vllm_config: VllmConfig) -> None:
    if not skip:
        return
    total = vllm_config.model_config.get_total_num_hidden_layers()
    kinds = layer_kinds(vllm_config)
    attention = range(total) if kinds is None else [i for i, k in enumerate(kinds) if k != "state"]
    skipped: set[int] = set()
    for layer in skip:
        if isinstance(layer, str):
            named = [i for i in attention if kinds is None or kinds[i] == layer]
            if not named:
                raise ValueError(
                    f"sparsekv.skip_layers={layer!r}: the model has no such layers, it has "
                    f"{sorted(set(kinds or ()))}"
                )
            skipped.update(named if kinds is not None else ())
        elif not -total <= layer < total or layer % total not in attention:
            raise ValueError(
                f"sparsekv.skip_layers={layer}: must be the index of an attention layer, one of "
                f"{list(attention)} or negative, counted from the end ({total} layers)"
            )
        else:
            skipped.add(layer % total)
    if skipped >= set(attention):
        raise ValueError(
            f"sparsekv.skip_layers={list(skip)}: must leave one of the {len(attention)} attention "
            f"layers sparse"
        )


def _check_drafter(vllm_config: VllmConfig) -> None:
    """Refuse sparse layers in a drafter that would not see their window."""
    if not has_drafter(vllm_config) or vllm_config.use_v2_model_runner:
        return
    given = {
        "speculative_config.attention_backend": [vllm_config.speculative_config.attention_backend],
        "attention_config.backend_per_kind": vllm_config.attention_config.backend_per_kind.values(),
    }
    for field, backends in given.items():
        if BACKEND_NAME in [backend.name for backend in backends if backend]:
            raise ValueError(
                f"{field} names sparsekv: must not with a draft model on vLLM's model runner V1, "
                f"which shows a drafter one cache group, not its window; its layers stay dense"
            )


def _check_cache_dtype(vllm_config: VllmConfig) -> None:
    """Take ``auto``, the model's own dtype, or what only the checkpoint asked for."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    asked = forget_cache_dtype_of_checkpoint(vllm_config)
    if asked:
        logger.info(
            "sparsekv: the checkpoint names a %s cache; sparse pages take its place "
            "(sparsekv.key_dtype and sparsekv.value_dtype)",
            asked,
        )
    own = str(model.dtype).removeprefix("torch.")
    if cache.cache_dtype == own:
        cache.cache_dtype = "auto"
    if cache.cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r}: must be 'auto' or the model's {own!r} with "
            f"attention_backend=sparsekv; sparsekv.key_dtype and sparsekv.value_dtype quantise"
        )


def _find_basis(vllm_config: VllmConfig) -> None:
    """Settle ``basis="auto"``: the file for this model, or none."""
    try:
        file = find_or_calibrate(vllm_config, settings_of(vllm_config).calibration_tokens)
    except CannotCalibrate as reason:
        model = vllm_config.model_config.model
        _settle(vllm_config, basis="none")
        try:
            stored = settings_of(vllm_config).vectors
        except ValueError as error:
            raise ValueError(f"{error}; {model} cannot be calibrated: {reason}") from error
        logger.warning(
            "sparsekv: %s cannot be calibrated: %s; stored uncalibrated, %s", model, reason, stored
        )
        return
    _check_basis(str(file.path), None, vllm_config.model_config)
    _settle(vllm_config, basis=str(file.path), basis_sha256=file.sha256)


def _settle(vllm_config: VllmConfig, **decided: Any) -> None:
    """Have every process of the engine know what was decided here."""
    given = _additional(vllm_config)
    settings = dict(given.get(SETTINGS_KEY) or {}) | decided
    vllm_config.additional_config = given | {SETTINGS_KEY: settings}


def _settle_block_size(vllm_config: VllmConfig) -> None:
    """Choose the block size of this format's pages, or check the user's."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    fmt = layer_format(vllm_config, model.get_head_size())
    if not cache.user_specified_block_size:
        cache.block_size = fmt.default_block_size
    elif cache.block_size > max(model.max_model_len, fmt.default_block_size):
        raise ValueError(
            f"block_size={cache.block_size}: must be <= {model.max_model_len}, max_model_len"
        )
    fmt.slots_per_block(cache.block_size)


def _check_basis(path: str, sha256: str | None, model: Any) -> BasisFile:
    """Refuse a basis calibrated on a model of another shape."""
    file = BasisFile.open(path, sha256)
    found = {
        "num_layers": {file.num_layers},
        "num_kv_heads": {heads for heads, _ in file.shapes.values()},
        "head_size": {size for _, size in file.shapes.values()},
    }
    needed = {
        "num_layers": model.get_total_num_hidden_layers(),
        "num_kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(),
    }
    for name, value in needed.items():
        if value not in found[name]:
            raise ValueError(
                f"sparsekv.basis={path!r}: its {name} is {', '.join(map(str, found[name]))} "
                f"(calibrated on {file.model}), must be {value} for {model.model}"
            )
    file.check()
    return file


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    """``additional_config`` as the user gave it; vLLM also allows an opaque object there."""
    given = vllm_config.additional_config
    return given if isinstance(given, dict) else {}
