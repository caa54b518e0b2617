"""Dense float64 attention over explicitly pruned vectors: what every implementation must compute.

Nothing here uses the packed format; pruning and quantisation are spelled out again from their
definitions in ``vllm_sparsekv/format/codecs.py`` and ``kernels/pack/reference.py``.
"""

from __future__ import annotations

import torch

from vllm_sparsekv.format.layout import VectorFormat


def largest(x: torch.Tensor, survivors: int) -> torch.Tensor:
    """(..., D) -> (..., D) bool: the ``survivors`` largest |x|, NaN over Inf, lower index first."""
    magnitude = x.double().abs().nan_to_num(nan=2e300, posinf=1e300)
    order = magnitude.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :survivors], True)


def pruned(x: torch.Tensor, fmt: VectorFormat) -> torch.Tensor:
    """(..., D) -> (..., D) float64: the vectors a page gives back, 0 where pruned."""
    kept = largest(x, fmt.survivors)
    stored = {"auto": _stored_auto, "fp8": _stored_fp8}.get(fmt.codec.name, _stored_integer)
    return torch.where(kept, stored(x, kept, fmt), 0.0)


def _stored_auto(x: torch.Tensor, kept: torch.Tensor, fmt: VectorFormat) -> torch.Tensor:
    return x.to(fmt.codec.dtype).double()


def _stored_fp8(x: torch.Tensor, kept: torch.Tensor, fmt: VectorFormat) -> torch.Tensor:
    limited = x.float().clamp(-448, 448).masked_fill(x.isinf(), torch.nan)
    return limited.to(torch.float8_e4m3fn).double()


def _stored_integer(x: torch.Tensor, kept: torch.Tensor, fmt: VectorFormat) -> torch.Tensor:
    if fmt.codec.name == "int4_int2":
        bands = zip(("int4", "int2"), x.chunk(2, -1), kept.chunk(2, -1), strict=True)
        return torch.cat([_rounded(*band) for band in bands], -1)
    return _rounded(fmt.codec.name, x, kept)


def _rounded(codec: str, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    by_codec = {"int4": (15, 15, 8, 1), "int3": (7.5, 7, 16, 1), "int2": (4, 3, 32, 17 / 16)}
    steps, largest, units, gain = by_codec[codec]
    x = x.float()
    low = x.masked_fill(~kept, torch.inf).amin(-1, keepdim=True).clamp_max(0)
    high = x.masked_fill(~kept, -torch.inf).amax(-1, keepdim=True).clamp_min(0)
    mantissa, exponent = ((high - low) / steps).half().float().frexp()
    unit = 2.0 ** (exponent - 5).clamp_min(-18)
    step = (mantissa.ldexp(exponent) / unit + 0.5).floor() * unit
    step = step.masked_fill(~(step < 2**16), torch.nan)
    middle = (low + high) / 2 * gain / step
    zero = (units * (largest / 2 - middle)).round().clamp(0, 127) / units
    code = (x * gain / step + zero).round().clamp(0, largest)
    return torch.where(step == 0, 0.0, step.double() * (code.double() - zero.double()))


def in_int8(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (..., D) float64: what a window of int8 gives back."""
    largest = x.float().abs().amax(-1, keepdim=True)
    mantissa, exponent = (largest / 127).frexp()  # 8 bits of it are kept
    step = (mantissa * 256).floor().ldexp(exponent - 8).masked_fill(~largest.isfinite(), torch.nan)
    codes = (x.float() / step).round().clamp(-127, 127)
    return torch.where(step == 0, 0.0, codes.double() * step.double())


def as_read(
    x: torch.Tensor, fmt: VectorFormat, held_from: int, context: int, window_dtype: str = "auto"
) -> torch.Tensor:
    """What attention reads of one request's keys or values.

    Args:
        x: (n, H, D), unpruned.
        fmt: format of these vectors.
        held_from: first position the ring holds for this step; all before it come from pages.
        context: tokens computed before this step; these are the last that can come from pages.
        window_dtype: of those the ring holds.

    Returns:
        (n, H, D) float64.
    """
    from_pages = min(held_from, context)
    held = x[from_pages:context]
    held = in_int8(held) if window_dtype == "int8" else held.double()
    return torch.cat([pruned(x[:from_pages], fmt), held, x[context:].double()])


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one request; its L queries are the last L of its n tokens.

    Args:
        query: (L, num_heads, D).
        key: (n, num_kv_heads, D).
        value: (n, num_kv_heads, D).
        scale: factor on q . k.
        sliding_window: positions a query sees, its own and those before it; None for all.
        soft_cap: c of ``c * tanh(score / c)``.
        sinks: (num_heads,), the score of one more key each, whose value is 0.

    Returns:
        (L, num_heads, D) float64.
    """
    group = query.shape[1] // key.shape[1]
    key = key.double().repeat_interleave(group, dim=1)
    value = value.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("lhd,nhd->hln", query.double(), key) * scale
    if soft_cap is not None:
        scores = (scores / soft_cap).tanh() * soft_cap
    length, n = scores.shape[1:]
    back = torch.arange(n - length, n)[:, None] - torch.arange(n)
    unseen = back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)
    scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, length, 1)
        scores = torch.cat([scores, sink], dim=-1)
    return torch.einsum("hln,nhd->lhd", scores.softmax(-1)[..., :n], value)
