"""Where this package hooks into vLLM: its backends, platforms, engine arguments and runners."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparsekv.engine.compat.config import changed_options, is_admitted, set_admitted


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
    member: Any,
    selected: Callable[[VllmConfig], None],
    derived: Callable[[VllmConfig], None],
    other: Callable[[VllmConfig], None],
) -> None:
    """Call ``selected`` on every engine configuration that selects ``member``, else ``other``.

    ``derived`` is called on what vLLM derives from one of the former, for a drafter or a tower,
    whatever it selects.

    It runs inside ``VllmConfig`` creation, in the user's own process, so what it raises reaches
    the caller of ``LLM()`` or ``vllm serve`` before any weight is read.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
            cache, attention = vllm_config.cache_config, vllm_config.attention_config
            before = cache.block_size
            original(vllm_config)
            if is_admitted(vllm_config):
                # The cache is the engine's; platforms set its block size again.
                cache.block_size = before
                derived(vllm_config)
            elif member in [attention.backend, *(attention.backend_per_kind or {}).values()]:
                selected(vllm_config)
                set_admitted(vllm_config)
            else:
                other(vllm_config)

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


def watch_engine_arguments(prepare: Callable[[Any], None]) -> None:
    """Call ``prepare`` on the arguments an engine's configuration is made from; remember them."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **options: Any) -> Any:
            prepare(self)
            token = _engine_args.set(self)
            try:
                return original(self, *args, **options)
            finally:
                _engine_args.reset(token)

        return create_engine_config

    wrap_once(EngineArgs, "create_engine_config", make)


_engine_args: ContextVar[Any] = ContextVar("engine_args", default=None)


def engine_arguments() -> dict[str, Any] | None:
    """Engine options that the user set, while a configuration is made from them; else None."""
    from vllm.engine.arg_utils import EngineArgs

    engine_args = _engine_args.get()
    return None if engine_args is None else changed_options(engine_args, EngineArgs())


def register_ring(spec: type[CircularBufferSpec], manager: type[CircularBufferManager]) -> None:
    """Tell vLLM's block pool which manager serves ``spec``."""
    # The registry adds vLLM's own specs only while it is empty, so they must go in before ours.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(spec, manager)


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

    wrap_once(CPUModelRunner, "_zero_block_ids", make)


def show_drafters(layer_type: type[AttentionLayerBase]) -> None:
    """Have model runner V2 give drafters the metadata of their cache layers of this type too.

    It has collected a drafter's layers before these are registered.
    """
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def set_attn(self: Any, *args: Any, **kwargs: Any) -> None:
            layers = self.vllm_config.compilation_config.static_forward_context
            self.draft_attn_layer_names |= {
                name
                for name, layer in layers.items()
                if isinstance(layer, layer_type) and layer.is_draft_layer
            }
            original(self, *args, **kwargs)

        return set_attn

    wrap_once(DraftModelSpeculator, "set_attn", make)


def _wrap_platform_hook(
    name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    wrap_once(type(current_platform), name, make, classmethod)


def wrap_once(
    owner: type,
    name: str,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    kind: Callable[[Callable[..., Any]], Any] = lambda function: function,
) -> None:
    """Replace a method by what ``make`` makes of it, the first time this is called."""
    original = getattr(owner, name)
    if getattr(original, "wrapped_by_sparsekv", False):
        return
    wrapper: Any = make(original)
    wrapper.wrapped_by_sparsekv = True
    setattr(owner, name, kind(wrapper))
