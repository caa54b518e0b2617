"""Models whose keys or values are hard to quantise, made from a healthy Llama.

Each stays about as good a language model as it was with a dense cache, so what a compressed cache
loses on it is the cache's own doing:

* ``offset-30-slow`` and the like: constant key biases of that size, as in Qwen2, in two rotary
  planes of each KV head, the slowest or fast ones (plane i is channels i and i + D/2);
* ``huge-channel``: one rotary plane of keys and one channel of values times 128, queries and output
  weights there divided by as much: the same function;
* ``huge-first-token``: the first key of a text about 20 times as long as the others, in one rotary
  plane where queries do not look.

Slow planes barely turn: a query sees nearly the same offset in all keys, which softmax ignores.
What is left of it stays small because keys there are larger too, and queries smaller. In fast
planes queries must be zero, so a calibrated basis may drop those for free. All factors and offsets
are exact in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

FACTOR = 128
"""How much larger ``huge-channel`` makes a channel: a power of two, so exact in any float."""

FIRST_TOKEN = 50
"""Length of the first key of ``huge-first-token`` in its plane, in mean lengths of keys."""

TEXTS, LENGTH = 8, 256
"""Size of what the model is observed on: its own text."""


def damage(name: str, source: str, folder: Path) -> None:
    """Write a damaged copy of a model, with its tokenizer, as a Hugging Face folder.

    Args:
        name: one of :data:`DAMAGES`.
        source: folder of a Llama without biases; its dtype is kept.
        folder: made if it does not exist.

    Raises:
        ValueError: unknown name, another architecture, or no layer tells the first token apart.
    """
    if name not in DAMAGES:
        raise ValueError(f"damage {name!r}: must be one of {list(DAMAGES)}")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    if not isinstance(model, LlamaForCausalLM) or model.config.attention_bias:
        raise ValueError(f"{source}: must be a Llama without biases")
    with torch.no_grad():
        model = DAMAGES[name](model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def planes(weight: torch.Tensor, head_size: int, kv_heads: int) -> torch.Tensor:
    """A view of query or key weights by rotary plane.

    Args:
        weight: (heads * D, ...), rows of q_proj or k_proj.

    Returns:
        (kv_heads, heads of each, 2, D/2, ...); plane i is [:, :, :, i].
    """
    return weight.view(kv_heads, -1, 2, head_size // 2, *weight.shape[1:])


def own_text(model: LlamaForCausalLM) -> torch.Tensor:
    """(TEXTS, LENGTH) int64 sampled from the model after random first tokens, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = torch.randint(model.config.vocab_size, (TEXTS, 1))
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            min_new_tokens=LENGTH - 1,
            max_new_tokens=LENGTH - 1,
            pad_token_id=0,
        )


def observed(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's projections get to see: (texts, length, hidden size) float32."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].float())
        )
        for layer in model.model.layers
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _heads(model: LlamaForCausalLM) -> dict[str, int]:
    config = model.config
    return {"head_size": config.head_dim, "kv_heads": config.num_key_value_heads}


def plane_use(model: LlamaForCausalLM, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean squared queries times the variance of keys, before RoPE.

    Returns:
        (num_kv_heads, D/2) float32, how much scores vary with each rotary plane.
    """
    rows = x.flatten(0, 1)
    query, key = (
        planes((rows @ projection.weight.float().T).T, **_heads(model))
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return (query.square().mean(-1).sum(1) * key.var(-1).squeeze(1)).sum(1)


def _least_used(
    model: LlamaForCausalLM, layer: torch.nn.Module, x: torch.Tensor, fastest: int
) -> torch.Tensor:
    """(num_kv_heads, 2) int64, planes among the first ``fastest`` ones."""
    return plane_use(model, layer, x)[:, :fastest].topk(2, largest=False).indices


def _offset(model: LlamaForCausalLM, size: float, slow: bool) -> PreTrainedModel:
    """The same weights as a Qwen2, with key biases of ``size`` and ``-size``.

    The slowest two planes, where keys get about ``size / 16`` times as large and queries as much
    smaller; or of the fastest quarter the two least used, where queries become zero.
    """
    inputs = [] if slow else observed(model, own_text(model))
    config = model.config.to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(name, None)
    damaged = Qwen2ForCausalLM(Qwen2Config(**config)).to(model.dtype)
    damaged.load_state_dict(model.state_dict(), strict=False)
    heads = _heads(model)
    half = heads["head_size"] // 2
    slowest = torch.tensor([half - 2, half - 1]).expand(heads["kv_heads"], 2)
    factor = 2 ** round(math.log2(size / 16))
    for index, layer in enumerate(damaged.model.layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias.zero_()
        queries = planes(attention.q_proj.weight, **heads)
        keys = planes(attention.k_proj.weight, **heads)
        bias = planes(attention.k_proj.bias, **heads)
        chosen = slowest if slow else _least_used(model, layer, inputs[index], half // 4)
        for head, (plus, minus) in enumerate(chosen):
            both = torch.stack([plus, minus])
            queries[head, :, :, both] *= 1 / factor if slow else 0
            keys[head, :, :, both] *= factor if slow else 1
            bias[head, 0, 0, plus], bias[head, 0, 0, minus] = size, -size
    return damaged


def _huge_channel(model: LlamaForCausalLM) -> PreTrainedModel:
    """The middle rotary plane of keys and the first channel of values, times :data:`FACTOR`."""
    heads = _heads(model)
    size = heads["head_size"]
    for layer in model.model.layers:
        attention = layer.self_attn
        planes(attention.k_proj.weight, **heads)[:, :, :, size // 4] *= FACTOR
        planes(attention.q_proj.weight, **heads)[:, :, :, size // 4] /= FACTOR
        attention.v_proj.weight[::size] *= FACTOR
        attention.o_proj.weight[:, ::size] /= FACTOR
    return model


def _huge_first_token(model: LlamaForCausalLM) -> PreTrainedModel:
    """A key channel reads what tells the first token apart, in the layers where something does.

    From some layer on, language models keep a massive activation at the first token, whatever the
    token. Ridge regression finds the direction that only it has; in one plane a row of the keys
    takes that direction, the other row and the queries are zero.
    """
    heads = _heads(model)
    changed = 0
    for layer, x in zip(model.model.layers, observed(model, own_text(model)), strict=True):
        rows = x.flatten(0, 1).double()
        gram, first = rows.T @ rows, x[:, 0].double()
        penalty = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
        direction = torch.linalg.solve(gram + penalty, first.sum(0))
        direction /= (first @ direction).mean()
        if (first @ direction).min() < 0.9:
            continue
        changed += 1
        keys = (x @ layer.self_attn.k_proj.weight.float().T).unflatten(-1, (heads["kv_heads"], -1))
        weight = planes(layer.self_attn.k_proj.weight, **heads)
        queries = planes(layer.self_attn.q_proj.weight, **heads)
        for head, plane in enumerate(plane_use(model, layer, x).argmin(1)):
            queries[head, :, :, plane] = 0
            weight[head, 0, 1, plane] = 0
            length = FIRST_TOKEN * keys[:, :, head].norm(dim=-1).mean()
            weight[head, 0, 0, plane] = (length * direction).to(weight.dtype)
    if not changed:
        raise ValueError("no layer has a massive activation at the first token")
    return model


DAMAGES: dict[str, Callable[[LlamaForCausalLM], PreTrainedModel]] = {
    **{
        f"offset-{size}-{speed}": partial(_offset, size=size, slow=speed == "slow")
        for size in (30, 100, 300)
        for speed in ("slow", "fast")
    },
    "huge-channel": _huge_channel,
    "huge-first-token": _huge_first_token,
}
"""Damaged models by name."""
