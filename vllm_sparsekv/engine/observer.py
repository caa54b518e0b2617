"""What workers of a calibrating engine do: watch what attention gets, and hand the moments out."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

from vllm_sparsekv.calibration.moments import Moments, head_grams
from vllm_sparsekv.engine.compat import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    layer_index,
    output_projection,
)
from vllm_sparsekv.engine.layers import sparse_layers
from vllm_sparsekv.format.basis import kv_heads_of_rank


class Observer:
    """Mixed into vLLM's worker, ``worker_extension_cls``; its methods are called by name."""

    model_runner: Any
    vllm_config: Any

    def sparsekv_observe(self) -> list[dict[str, int]]:
        """Begin to observe, at the positions :meth:`sparsekv_place` says.

        Returns:
            for each layer of this rank that stores keys: ``index``, ``num_kv_heads`` of the whole
            model, its ``first`` and ``stop`` here, ``head_size``, and whether it is ``centred``.
        """
        self.sparsekv_first: int | None = None
        self.sparsekv_moments_of: dict[int, Moments] = {}
        self.model_runner.model.register_forward_pre_hook(self._sparsekv_move, with_kwargs=True)
        layers = sparse_layers(self.vllm_config)
        step: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        found = []
        for name, layer in layers.items():
            owner = layer.kv_sharing_target_layer_name or name
            index = layer_index(owner)
            if owner == name:
                moments = Moments.zeros(layer.num_kv_heads, layer.head_size)
                self.sparsekv_moments_of[index] = moments
                found.append(self._sparsekv_describe(index, layer))
            self._sparsekv_watch(layer, self.sparsekv_moments_of[index], step)
        return found

    def sparsekv_place(self, first: int | None) -> None:
        """Observe the next prompts, their first token at this position; None: look away."""
        self.sparsekv_first = first

    def sparsekv_moments(self, index: int) -> bytes | None:
        """Moments of a layer in safetensors format; None if it is on another rank."""
        moments = self.sparsekv_moments_of.get(index)
        return None if moments is None else save(vars(moments))

    def _sparsekv_describe(self, index: int, layer: Any) -> dict[str, int]:
        size = get_tensor_model_parallel_world_size()
        total = layer.num_kv_heads * size
        if layer.num_kv_heads == 1:
            total = min(total, self.vllm_config.model_config.get_total_num_kv_heads())
        heads = kv_heads_of_rank(total, get_tensor_model_parallel_rank(), size)
        return {
            "index": index,
            "num_kv_heads": total,
            "first": heads.start,
            "stop": heads.stop,
            "head_size": layer.head_size,
            "centred": int(layer.impl.takes_means),
        }

    def _sparsekv_move(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        if self.sparsekv_first:
            kwargs["positions"] = kwargs["positions"] + self.sparsekv_first
        return args, kwargs

    def _sparsekv_watch(
        self,
        layer: Any,
        moments: Moments,
        step: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Have a layer's attention observed.

        Args:
            layer: vLLM's ``Attention``.
            moments: what to add to.
            step: this step's keys and values by the cache they go to, for layers that share it.
        """
        impl, cache = layer.impl, layer.impl.cache
        forward, projection = impl.forward, output_projection(self.model_runner.model, layer)
        reading = None if projection is None else head_grams(projection, layer.head_size)

        def observed(layer, query, key, value, kv_cache, attn_metadata, *rest, **options):
            if self.sparsekv_first is not None and attn_metadata is not None:
                tokens = attn_metadata.num_actual_tokens
                if attn_metadata.seq_lens.tolist()[:1] != [tokens]:
                    raise RuntimeError("calibration needs each prompt whole in a step of its own")
                if key is not None:
                    step[id(cache)] = key[:tokens], value[:tokens]
                moments.observe(
                    query[:tokens],
                    *step[id(cache)],
                    reading,
                    impl.scale,
                    impl.sliding_window,
                    impl.soft_cap,
                    impl.sinks,
                )
            return forward(layer, query, key, value, kv_cache, attn_metadata, *rest, **options)

        impl.forward = observed
