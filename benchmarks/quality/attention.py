"""The attention rule of the sparse cache at every position of a text, in one forward pass.

The rule is that of ``kernels/attention/reference.py``: a query at position t in a step that
starts at c reads positions j >= c dense, the window before c as the window returns them, and all
earlier ones as the cache does.
Here every position is a query and steps are ``chunk`` tokens long, so c = t // chunk * chunk;
``chunk=1`` is decoding token by token, the hardest case, and ``chunk=n`` a prompt processed n
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quality.methods import Method, Shape

TILE = 64
"""Positions whose queries are handled at once: their scores fit a CPU's caches."""

NAME = "cached_rule"


def rule_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    method: Method,
    dtype: torch.dtype,
    scale: float,
    chunk: int = 1,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one text.

    Args:
        query: (num_heads, tokens, D) float32.
        key: (num_kv_heads, tokens, D) float32, after RoPE.
        value: (num_kv_heads, tokens, D) float32.
        method: the cache.
        dtype: what dense keys and values are rounded to.
        scale: factor on q . k.
        chunk: tokens of one step.
        sliding_window: newest tokens a query sees, its own among them.
        soft_cap: scores are ``soft_cap * tanh(score / soft_cap)``.
        sinks: (num_heads,) logits that only take part in the softmax's denominator.

    Returns:
        (num_heads, tokens, D) float32.
    """
    key, value = key.to(dtype), value.to(dtype)
    cached_key, cached_value = method.key(key, query), method.value(value)
    held_key, held_value = method.held(key, value) if method.held else (None, None)
    key, value = key.float(), value.float()
    num_kv_heads, tokens, _ = key.shape
    grouped = query.unflatten(0, (num_kv_heads, -1)) * scale
    position = torch.arange(tokens)
    first_of_step = position // chunk * chunk
    first_dense = first_of_step - method.window
    out = torch.empty_like(grouped)
    window = tokens if sliding_window is None else sliding_window
    gone = None
    if method.eviction and sliding_window is None:  # a window's layers are bounded as they are
        gone = method.eviction.gone(query, cached_key, scale)
    for start in range(0, tokens, TILE):
        end = min(start + TILE, tokens)
        oldest = max(0, start - window + 1)
        # Keys before `split` are cached for every query of the tile; from there on it depends.
        split = max(oldest, int(first_dense[start]))
        dense = position[split:end] >= first_dense[start:end, None]
        own = dense if held_key is None else position[split:end] >= first_of_step[start:end, None]
        distance = position[start:end, None] - position[oldest:end]
        hidden = (distance < 0) | (distance >= window)
        for head, queries in enumerate(grouped[:, :, start:end].flatten(1, 2)):
            weights = queries @ cached_key[head, oldest:end].mT
            near = weights[:, split - oldest :].unflatten(0, (-1, end - start))
            exact = (queries @ key[head, split:end].mT).unflatten(0, near.shape[:2])
            if held_key is not None:
                held = (queries @ held_key[head, split:end].mT).unflatten(0, near.shape[:2])
                near.copy_(torch.where(dense, held, near))
            near.copy_(torch.where(own, exact, near))
            if soft_cap is not None:
                weights.div_(soft_cap).tanh_().mul_(soft_cap)
            unseen = hidden if gone is None else hidden | gone[head, start:end, oldest:end]
            weights.unflatten(0, (-1, end - start)).masked_fill_(unseen, -torch.inf)
            largest = weights.amax(-1, keepdim=True)
            total = 0
            if sinks is not None:
                sink = sinks.float().view(num_kv_heads, -1)[head].repeat_interleave(end - start)
                largest = torch.maximum(largest, sink[:, None])
                total = (sink[:, None] - largest).exp()
            weights.sub_(largest).exp_()
            total = total + weights.sum(-1, keepdim=True)
            result = (near * own).flatten(0, 1) @ value[head, split:end]
            if held_value is not None:
                result += (near * (dense & ~own)).flatten(0, 1) @ held_value[head, split:end]
            near *= ~dense
            result += weights @ cached_value[head, oldest:end]
            out[head, :, start:end] = result.div_(total).unflatten(0, near.shape[:2])
    return out.flatten(0, 1)


class RuleModel:
    """A Hugging Face causal language model in float32 with the cache rule in its attention.

    Args:
        path: model folder.
        dtype: dtype of dense keys and values, bfloat16 as in a bf16 server.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.bfloat16) -> None:
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        self.dtype = dtype
        self.shape = Shape.of(self.model.config)
        self._active: tuple[Method, int] | None = None

    @property
    def head_size(self) -> int:
        return self.shape.head_size

    def _attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        method, chunk = self._active
        if method.layers:
            method = method.layers[module.layer_idx]
        out = rule_attention(
            query[0],
            key[0],
            value[0],
            method,
            self.dtype,
            scaling,
            chunk,
            kwargs.get("sliding_window"),
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
        )
        return out.transpose(0, 1).unsqueeze(0).contiguous(), None

    @contextmanager
    def _using(self, method: Method, chunk: int) -> Iterator[None]:
        self._active = method, chunk
        try:
            yield
        finally:
            self._active = None

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, method: Method, chunk: int = 1) -> torch.Tensor:
        """(tokens,) int64 -> (tokens, hidden size), the input of the output layer."""
        with self._using(method, chunk):
            return self.model.base_model(tokens.unsqueeze(0), use_cache=False).last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, hidden size) -> (n, vocabulary) float32."""
        config = self.model.config.get_text_config(decoder=True)
        factor = getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)
        logits = self.model.get_output_embeddings()(hidden) * factor
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()
