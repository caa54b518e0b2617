"""Calibrate the basis in which a model's keys lose least: ``sparsekv-calibrate MODEL``.

An error e in a key moves the score of a query q by ``q . e``. With Sk the second moment of the
keys of a KV head and Sq that of the queries of its group, the map T of :func:`balance` makes both
the same matrix (balanced coordinates as in model reduction, Moore 1981), so that a coordinate
matters to scores as much as it is large. Its eigenvectors then put as much as can be into few
coordinates, which is what pruning by magnitude wants, and a Hadamard rotation spreads it evenly,
which is what whole integer vectors want. Keys count by the attention they receive, p (1 - p)
summed over queries, the derivative of the softmax.

The command runs the Hugging Face model once over a text; it needs transformers, and not vLLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_sparsekv.basis_file import write_basis

NAME = "sparsekv_calibration"

RIDGE = 1e-2
"""Added to the diagonal of both moments, in units of its mean."""

LARGEST_CONDITION = 100.0
"""Of a key matrix: the ratio of its largest to its smallest singular value."""


class Moments:
    """Second moments of the keys and queries that pass through a model's attention.

    Attributes:
        key: by layer (num_kv_heads, D, D) float64, sum of k k^t over keys, weighted.
        query: by layer (num_kv_heads, D, D) float64, sum of q q^t over the queries of the group.
    """

    def __init__(self) -> None:
        self.key: dict[int, torch.Tensor] = {}
        self.query: dict[int, torch.Tensor] = {}

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Causal attention of one unpadded text under transformers' interface, observed.

        Args:
            module: the attention layer; its ``layer_idx`` names the moments.
            query: (1, num_heads, tokens, D) after RoPE.
            key: (1, num_kv_heads, tokens, D) after RoPE.
            value: (1, num_kv_heads, tokens, D).
            scaling: factor on q . k.

        Returns:
            (1, tokens, num_heads, D) in the dtype of query, and no weights.
        """
        num_kv_heads, tokens = key.shape[1:3]
        grouped = query[0].unflatten(0, (num_kv_heads, -1))
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        out, received = [], []
        for q, k, v in zip(grouped, key[0], value[0], strict=True):
            scores = (q @ k.mT).float() * scaling
            p = scores.masked_fill(future, -torch.inf).softmax(-1)
            received.append((p * (1 - p)).sum((0, 1)))
            out.append(p.to(v.dtype) @ v)
        self._add(self.key, module.layer_idx, key[0], torch.stack(received))
        self._add(self.query, module.layer_idx, grouped.flatten(1, 2))
        return torch.cat(out).transpose(0, 1).unsqueeze(0).contiguous(), None

    @staticmethod
    def _add(moments, layer: int, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add the moment of x, (num_kv_heads, n, D), weighted by (num_kv_heads, n)."""
        x = x.double()
        weighted = x if weight is None else x * weight.double().unsqueeze(-1)
        moments[layer] = moments.get(layer, 0) + (x.mT @ weighted).cpu()


def balance(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The symmetric T with ``T Sk T^t == T^-t Sq T^-1``.

    T^t T is the geometric mean of Sq and Sk^-1 (Pusz and Woronowicz 1975).

    Args:
        key: Sk, (..., D, D) float64, positive definite.
        query: Sq, likewise.
    """
    root = _power(query, 0.5)
    return _power(root @ _power(root @ key @ root, -0.5) @ root, 0.5)


def key_matrices(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What keys are to be multiplied with, from the moments of one layer.

    Args:
        key: (num_kv_heads, D, D) float64, moments of the keys.
        query: (num_kv_heads, D, D) float64, moments of the queries.

    Returns:
        (num_kv_heads, D, D) float64 of determinant +-1, condition at most
        :data:`LARGEST_CONDITION`: the balanced basis, most important coordinate first.
    """
    key, query = _with_ridge(key), _with_ridge(query)
    stretch, axes = torch.linalg.eigh(balance(key, query))
    bound = LARGEST_CONDITION**0.5
    stretch = (stretch / _geometric_mean(stretch)).clamp(1 / bound, bound)
    balanced = axes @ torch.diag_embed(stretch / _geometric_mean(stretch)) @ axes.mT
    _, principal = torch.linalg.eigh(balanced @ key @ balanced)
    return balanced @ principal.flip(-1)


@torch.inference_mode()
def calibrate(model: PreTrainedModel, samples: torch.Tensor) -> list[torch.Tensor]:
    """Key matrices of all layers of a model.

    Args:
        model: a decoder whose attention implementation can be chosen.
        samples: (count, tokens) int64, run one by one.

    Returns:
        by layer (num_kv_heads, D, D) float64, see :func:`key_matrices`.
    """
    moments = Moments()
    ALL_ATTENTION_FUNCTIONS.register(NAME, moments.attention)
    model.set_attn_implementation(NAME)
    for index, tokens in enumerate(samples, 1):
        model.base_model(tokens.unsqueeze(0).to(model.device), use_cache=False)
        print(f"sample {index}/{len(samples)}", file=sys.stderr, flush=True)
    layers = sorted(moments.key)
    return [key_matrices(moments.key[layer], moments.query[layer]) for layer in layers]


def text_samples(tokenizer, path: Path, tokens: int, length: int) -> torch.Tensor:
    """The first tokens of a text in runs of ``length``, (count, length) int64.

    Raises:
        ValueError: the text is too short.
    """
    found = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    count = tokens // length
    if len(found) < count * length:
        raise ValueError(f"{path}: {len(found)} tokens, must be >= {count * length} (--tokens)")
    return torch.tensor(found[: count * length]).view(count, length)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values**exponent) @ vectors.mT


def _with_ridge(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moment + RIDGE * mean * torch.eye(moment.shape[-1], dtype=moment.dtype)


def _geometric_mean(x: torch.Tensor) -> torch.Tensor:
    return x.log().mean(-1, keepdim=True).exp()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sparsekv-calibrate", description="Calibrate the key basis of a model."
    )
    parser.add_argument("model", help="folder or name of a Hugging Face model")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8, like what is served")
    parser.add_argument("--output", type=Path, default=Path("basis.safetensors"))
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default 8192)")
    parser.add_argument("--length", type=int, default=1024, help="of one sample (default 1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not 1 < args.length <= args.tokens:
        parser.error(f"--length {args.length}: must be > 1 and <= --tokens {args.tokens}")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        samples = text_samples(tokenizer, args.text, args.tokens, args.length)
        # Few CPUs multiply in half precision at speed.
        dtype = torch.float32 if args.device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        matrices = calibrate(model.eval().to(args.device), samples)
        write_basis(args.output, matrices, Path(args.model).name)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    condition = torch.linalg.cond(torch.stack(matrices))
    print(
        f"{args.output}: {len(matrices)} layers, {samples.numel()} tokens, "
        f"condition {condition.median():.1f} median, {condition.max():.1f} largest"
    )


if __name__ == "__main__":
    main()
