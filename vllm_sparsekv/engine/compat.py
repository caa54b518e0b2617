"""Every vLLM internal this package uses; nothing else imports vLLM.

Importing this module on an unsupported vLLM raises one line that says what to install.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from vllm.version import __version__ as VLLM_VERSION

SUPPORTED = ">=0.32,<0.34"


def check_version(version: str) -> None:
    """Raise ImportError unless this package supports the vLLM version."""
    if Version(version).base_version not in SpecifierSet(SUPPORTED):
        raise ImportError(
            f"vllm {version} found, vllm_sparsekv needs {SUPPORTED}: "
            f"pip install 'vllm{SUPPORTED}' (or set VLLM_PLUGINS to leave sparsekv out)"
        )


check_version(VLLM_VERSION)

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    KVCacheLayout,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

__all__ = [
    "VLLM_VERSION",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionType",
    "CircularBufferManager",
    "CircularBufferSpec",
    "CommonAttentionMetadata",
    "KVCacheLayout",
    "MultipleOf",
    "VllmConfig",
    "attention_layers",
    "changed_options",
    "check_version",
    "engine_arguments",
    "has_weights",
    "forget_cache_dtype_of_checkpoint",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "init_logger",
    "largest_position",
    "layer_index",
    "layer_metadata",
    "lookahead_tokens",
    "model_identity",
    "platform_backend",
    "register_backend_member",
    "register_before",
    "register_ring",
    "replace_backend",
    "state_pages",
    "watch_config",
    "watch_engine_arguments",
    "watch_layers",
    "workspace",
    "zero_on_cpu",
]


def register_backend_member(name: str, class_path: str, restore: Callable[[], Any]) -> Any:
    """Add ``name`` to vLLM's attention backends and make it selectable on this platform.

    Args:
        name: the enum member, upper case.
        class_path: dotted path of the ``AttentionBackend``.
        restore: module-level function that registers and returns the member. A spawned process
            unpickles its configuration before it has loaded plugins, so the member is pickled as
            a call of this function instead of by value.

    Returns:
        The ``AttentionBackendEnum`` member.
    """
    if name not in AttentionBackendEnum.__members__:
        register_backend(name, class_path)
    member = AttentionBackendEnum[name]
    member.__reduce_ex__ = lambda protocol: (restore, ())
    if current_platform.is_cpu():
        _honour_choice_on_cpu(member, class_path)
    return member


def _honour_choice_on_cpu(member: Any, class_path: str) -> None:
    """``CpuPlatform.get_attn_backend_cls`` ignores the selected backend; answer for ours."""

    def make(original: Callable[..., str]) -> Callable[..., str]:
        def get_attn_backend_cls(
            cls: type,
            selected_backend: Any,
            attn_selector_config: Any,
            num_heads: int | None = None,
        ) -> str:
            if selected_backend is not member:
                return original(selected_backend, attn_selector_config, num_heads)
            reasons = member.get_class().validate_configuration(
                device_capability=None, **attn_selector_config._asdict()
            )
            if reasons:
                raise ValueError(f"attention backend {member.name}: {'; '.join(reasons)}")
            return class_path

        return get_attn_backend_cls

    _wrap_platform_hook("get_attn_backend_cls", make)


def watch_config(
    member: Any, selected: Callable[[VllmConfig], None], other: Callable[[VllmConfig], None]
) -> None:
    """Call ``selected`` on every engine configuration that selects ``member``, else ``other``.

    It runs inside ``VllmConfig`` creation, in the user's own process, so what it raises reaches
    the caller of ``LLM()`` or ``vllm serve`` before any weight is read.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
            original(vllm_config)
            attention = vllm_config.attention_config
            chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
            check = selected if member in chosen else other
            check(vllm_config)

        return check_and_update_config

    _wrap_platform_hook("check_and_update_config", make)


def watch_layers(prepare: Callable[[VllmConfig, Callable[[], None]], None]) -> None:
    """Call ``prepare`` in every worker once its model is built, around vLLM's choice of block size.

    ``Platform.update_block_size_for_backend`` is where executors stop between loading the model
    and planning its cache.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def update_block_size_for_backend(cls: type, vllm_config: VllmConfig) -> None:
            prepare(vllm_config, lambda: original(vllm_config))

        return update_block_size_for_backend

    _wrap_platform_hook("update_block_size_for_backend", make)


def _wrap_platform_hook(
    name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    _wrap_once(type(current_platform), name, make, classmethod)


def _wrap_once(
    owner: type,
    name: str,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    kind: Callable[[Callable[..., Any]], Any] = lambda function: function,
) -> None:
    """Replace a method by what ``make`` makes of it, the first time this is called."""
    original = getattr(owner, name)
    if getattr(original, "wrapped_by_sparsekv", False):
        return
    wrapper = make(original)
    wrapper.wrapped_by_sparsekv = True
    setattr(owner, name, kind(wrapper))


def register_ring(spec: type[CircularBufferSpec], manager: type[CircularBufferManager]) -> None:
    """Tell vLLM's block pool which manager serves ``spec``."""
    # The registry adds vLLM's own specs only while it is empty, so they must go in before ours.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(spec, manager)


def attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's ``Attention`` modules of the built model, by name, in order."""
    # Like every model's module imported after plugins have loaded.
    from vllm.model_executor.layers.attention import Attention

    return get_layers_from_vllm_config(vllm_config, Attention)


def state_pages(vllm_config: VllmConfig) -> list[tuple[int, int]]:
    """Bytes of a page and of the state in it, of each layer with a state (Mamba and its like)."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    specs = [
        layer.get_kv_cache_spec(vllm_config)
        for layer in layers.values()
        if layer.get_attn_backend().is_ssm()
    ]
    return [(spec.page_size_bytes, spec.real_page_size_bytes) for spec in specs]


def register_before(vllm_config: VllmConfig, companions: dict[str, AttentionLayerBase]) -> None:
    """Register cache layers, each before the layer it is named by; their names are their own."""
    context = vllm_config.compilation_config.static_forward_context
    layers = dict(context)
    context.clear()
    for name, layer in layers.items():
        if name in companions:
            context[companions[name].layer_name] = companions[name]
        context[name] = layer


def platform_backend(vllm_config: VllmConfig, layer: Any) -> type[AttentionBackend]:
    """The backend the platform itself would choose for an attention layer."""
    attention = vllm_config.attention_config
    chosen, attention.backend = attention.backend, None
    cache = vllm_config.cache_config
    given, cache.user_specified_block_size = cache.user_specified_block_size, False
    try:
        with set_current_vllm_config(vllm_config):
            return get_attn_backend(
                layer.head_size,
                layer.dtype,
                layer.kv_cache_dtype,
                has_sink=layer.has_sink,
                attn_type=layer.attn_type,
                has_sliding_window=layer.sliding_window is not None,
            )
    finally:
        attention.backend, cache.user_specified_block_size = chosen, given


def replace_backend(vllm_config: VllmConfig, layer: Any, backend: type[AttentionBackend]) -> None:
    """Run an attention layer on ``backend``, built anew from what the layer is."""
    extra = {"sinks": layer.impl.sinks} if layer.has_sink else {}
    with set_current_vllm_config(vllm_config):
        layer.impl = backend.get_impl_cls()(*layer.impl.arguments, **extra)
    layer.attn_backend = backend
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.impl.process_weights_after_loading(layer.dtype)


def zero_on_cpu(layer_type: type[AttentionLayerBase]) -> None:
    """Have new blocks zeroed in layers of this type too, by their ``zero_blocks(block_ids)``.

    CPU runners zero the blocks of full-attention groups only, which need not cover what other
    groups see of a block; GPU runners zero all.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def zero_block_ids(self: Any, block_ids: list[int]) -> None:
            original(self, block_ids)
            for layer in self.compilation_config.static_forward_context.values():
                if isinstance(layer, layer_type):
                    layer.zero_blocks(block_ids)

        return zero_block_ids

    _wrap_once(CPUModelRunner, "_zero_block_ids", make)


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


def layer_index(layer_name: str) -> int:
    """Global index of the decoder layer in a module name."""
    # Every model's module is imported after plugins have loaded.
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def watch_engine_arguments() -> None:
    """Remember the arguments an engine's configuration is being made from."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **options: Any) -> Any:
            token = _engine_args.set(self)
            try:
                return original(self, *args, **options)
            finally:
                _engine_args.reset(token)

        return create_engine_config

    _wrap_once(EngineArgs, "create_engine_config", make)


_engine_args: ContextVar[Any] = ContextVar("engine_args", default=None)


def engine_arguments() -> dict[str, Any] | None:
    """Engine options that the user set, while a configuration is made from them; else None."""
    from vllm.engine.arg_utils import EngineArgs

    engine_args = _engine_args.get()
    return None if engine_args is None else changed_options(engine_args, EngineArgs())


def model_identity(vllm_config: VllmConfig) -> list[str]:
    """What tells a model from others: name, revision, configuration, quantisation, weights.

    Weights in a folder are known by their sizes and samples of their content, those of a hub by
    the commit.
    """
    model = vllm_config.model_config
    identity = [
        str(model.model),
        str(model.revision),
        str(model.quantization),
        model.hf_config.to_json_string(use_diff=False),
    ]
    if not Path(model.model).exists():
        return [*identity, str(getattr(model.hf_config, "_commit_hash", None))]
    return identity + [_content(file) for file in _weight_files(model.model)]


def has_weights(vllm_config: VllmConfig) -> bool:
    """False if the model is a folder without weights."""
    model = vllm_config.model_config.model
    return not Path(model).exists() or bool(_weight_files(model))


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


def output_projection(model: torch.nn.Module, layer: Any) -> torch.Tensor | None:
    """Wo, (hidden size, num_heads * D), of the linear layer that reads an attention layer's output.

    Taken from what the layer does to unit vectors, so it may be quantised. None where the module
    around the attention has no such layer, or several.
    """
    # Like every model's module imported after plugins have loaded.
    from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

    size = layer.num_heads * layer.head_size
    found = [
        child
        for module in model.modules()
        if any(child is layer for child in module.children())
        for child in module.children()
        if isinstance(child, (RowParallelLinear, ReplicatedLinear))
        and getattr(child, "input_size_per_partition", child.input_size) == size
    ]
    if len(found) != 1:
        return None
    unit = torch.eye(size, dtype=layer.dtype, device=next(model.parameters()).device)
    return found[0].quant_method.apply(found[0], unit, bias=None).mT


def parse_engine_options(arguments: list[str], prog: str) -> dict[str, Any]:
    """vLLM's engine options of a command line that differ from their defaults."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=prog))
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


@contextmanager
def offline_engine(options: dict[str, Any]) -> Iterator[Any]:
    """vLLM's ``LLM``, shut down at the end."""
    from vllm import LLM

    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def first_token(llm: Any, seed: int) -> int:
    """What a text begins with: the model's own token for that, else any."""
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return token
    return random.Random(seed).randrange(config.vocab_size)


def write_tokens(llm: Any, first: list[int], length: int) -> list[list[int]]:
    """Have the model write, ``length`` tokens after and with each of these."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [token]} for token in first]
    sampling = [
        SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=length - 1,
            ignore_eos=True,
            detokenize=False,
        )
        for seed in range(len(first))
    ]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        [token, *output.outputs[0].token_ids] for token, output in zip(first, outputs, strict=True)
    ]


def read_prompts(llm: Any, prompts: list[list[int]]) -> None:
    """Run prompts through the model and take one token each."""
    from vllm import SamplingParams

    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, detokenize=False),
        use_tqdm=False,
    )


def lookahead_tokens(vllm_config: VllmConfig) -> int:
    """Draft tokens a step may write beyond the accepted ones."""
    return max(vllm_config.num_speculative_tokens, vllm_config.num_lookahead_tokens)


def layer_metadata(layer_name: str) -> Any:
    """This step's attention metadata of a layer; None in profiling runs."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    return None if metadata is None else metadata[layer_name]


def workspace(elements: int) -> torch.Tensor | None:
    """Float32 scratch of one step, out of vLLM's own; None for 0 elements and without a worker.

    Asked for in the profiling run, it is part of what vLLM sets aside; later calls of the same size
    return the same memory, also within CUDA graphs.
    """
    if not elements or not is_workspace_manager_initialized():
        return None
    return current_workspace_manager().get_simultaneous(((elements,), torch.float32))[0]
