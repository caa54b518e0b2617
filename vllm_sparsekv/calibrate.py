"""Calibrate the basis in which a model's keys and values lose least: ``sparsekv-calibrate MODEL``.

An error e in a key moves the score of a query q by ``q . e``. With S the second moment of the keys
of a KV head and R that of the queries of its group, the map T of :func:`balance` makes both the
same matrix (balanced coordinates as in model reduction, Moore 1981), so that a coordinate matters
to scores as much as it is large. Its eigenvectors then put as much as can be into few coordinates,
which is what pruning by magnitude wants, and a Hadamard rotation spreads it evenly, which is what
whole integer vectors want. Keys count by the attention they receive, p (1 - p) summed over
queries, the derivative of the softmax.

An error e in a value moves the layer's output by ``p Wo e``. Values count by p squared, summed over
queries, and are read by the rows of the output projection Wo, each head's as much as its own p
squared.

Rotary embedding turns keys and queries with their position, the slowest planes by little within
one sample. Attention knows only distances, so samples are placed all over the context: the moments
are then those of keys at any position.

The command runs the Hugging Face model once over a text; it needs transformers, and not vLLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_sparsekv.basis import LayerMatrices
from vllm_sparsekv.basis_file import write_basis

NAME = "sparsekv_calibration"

RIDGE = 1e-2
"""Added to the diagonal of moments, in units of its mean."""

LARGEST_CONDITION = 100.0
"""Of a matrix: the ratio of its largest to its smallest singular value."""

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
"""What transformers' attention layers call the linear layer after attention."""


class Moments:
    """Second moments of what is stored and of what reads it, by attention layer.

    Attributes:
        key: (num_kv_heads, D, D) float64, sum of k k^t over keys, weighted.
        query: (num_kv_heads, D, D) float64, sum of q q^t over the queries of the group.
        value: (num_kv_heads, D, D) float64, sum of v v^t over values, weighted.
        output: (num_kv_heads, D, D) float64, sum of Wo^t Wo over the heads of the group, weighted.
    """

    def __init__(self) -> None:
        self.key: dict[int, torch.Tensor] = {}
        self.query: dict[int, torch.Tensor] = {}
        self.value: dict[int, torch.Tensor] = {}
        self.output: dict[int, torch.Tensor] = {}

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

        Raises:
            ValueError: the layer has no output projection under a known name.
        """
        num_kv_heads, tokens = key.shape[1:3]
        grouped = query[0].unflatten(0, (num_kv_heads, -1))
        projection = _output_projection(module).unflatten(1, (*grouped.shape[:2], -1))
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        out, key_weight, value_weight, head_weight = [], [], [], []
        for q, k, v in zip(grouped, key[0], value[0], strict=True):
            scores = (q @ k.mT).float() * scaling
            p = scores.masked_fill(future, -torch.inf).softmax(-1)
            squared = p.square()
            key_weight.append((p - squared).sum((0, 1)))
            value_weight.append(squared.sum((0, 1)))
            head_weight.append(squared.sum((1, 2)))
            out.append(p.to(v.dtype) @ v)
        read = projection.permute(1, 2, 0, 3)
        rows = torch.stack(head_weight).unsqueeze(-1).expand(read.shape[:3])
        layer = module.layer_idx
        _add(self.key, layer, key[0], torch.stack(key_weight))
        _add(self.query, layer, grouped.flatten(1, 2))
        _add(self.value, layer, value[0], torch.stack(value_weight))
        _add(self.output, layer, read.flatten(1, 2), rows.flatten(1, 2))
        return torch.cat(out).transpose(0, 1).unsqueeze(0).contiguous(), None


def _output_projection(module: torch.nn.Module) -> torch.Tensor:
    """Weight (hidden size, num_heads * D) of the linear layer after attention."""
    for name in OUTPUT_PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None:
            return weight
    raise ValueError(
        f"{type(module).__name__}: has no output projection, must be one of {OUTPUT_PROJECTIONS}"
    )


def _add(
    moments: dict[int, torch.Tensor],
    layer: int,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> None:
    """Add the moment of x, (num_kv_heads, n, D), weighted by (num_kv_heads, n)."""
    x = x.double()
    weighted = x if weight is None else x * weight.double().unsqueeze(-1)
    moments[layer] = moments.get(layer, 0) + (x.mT @ weighted).cpu()


def balance(stored: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """The symmetric T with ``T S T^t == T^-t R T^-1``.

    T^t T is the geometric mean of R and S^-1 (Pusz and Woronowicz 1975).

    Args:
        stored: S, (..., D, D) float64, positive definite.
        reader: R, likewise.
    """
    root = _power(reader, 0.5)
    return _power(root @ _power(root @ stored @ root, -0.5) @ root, 0.5)


def balanced_basis(stored: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """What vectors are to be multiplied with, from the moments of one layer.

    Args:
        stored: (num_kv_heads, D, D) float64, moments of the vectors.
        reader: (num_kv_heads, D, D) float64, moments of what they are multiplied with later.

    Returns:
        (num_kv_heads, D, D) float64 of determinant +-1, condition at most
        :data:`LARGEST_CONDITION`: the balanced basis, most important coordinate first.
    """
    stored, reader = _with_ridge(stored), _with_ridge(reader)
    stretch, axes = torch.linalg.eigh(balance(stored, reader))
    bound = LARGEST_CONDITION**0.5
    stretch = (stretch / _geometric_mean(stretch)).clamp(1 / bound, bound)
    balanced = axes @ torch.diag_embed(stretch / _geometric_mean(stretch)) @ axes.mT
    _, principal = torch.linalg.eigh(balanced @ stored @ balanced)
    return balanced @ principal.flip(-1)


@torch.inference_mode()
def calibrate(model: PreTrainedModel, samples: torch.Tensor, context: int) -> list[LayerMatrices]:
    """Bases of all layers of a model.

    Args:
        model: a decoder whose attention implementation can be chosen.
        samples: (count, tokens) int64, run one by one.
        context: positions to calibrate for; samples are spread over them, at least ``tokens``.

    Returns:
        by layer, float64, see :func:`balanced_basis`.

    Raises:
        ValueError: an attention layer whose output projection is not found.
    """
    moments = Moments()
    ALL_ATTENTION_FUNCTIONS.register(NAME, moments.attention)
    model.set_attn_implementation(NAME)
    for index, tokens in enumerate(samples, 1):
        # Multiples of the golden ratio, modulo 1, fill the unit interval evenly.
        first = round((context - len(tokens)) * (index * (5**0.5 - 1) / 2 % 1))
        positions = torch.arange(first, first + len(tokens), device=model.device)
        model.base_model(
            tokens.unsqueeze(0).to(model.device),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
        )
        print(f"sample {index}/{len(samples)}", file=sys.stderr, flush=True)
    return [
        LayerMatrices(
            key=balanced_basis(moments.key[layer], moments.query[layer]),
            value=balanced_basis(moments.value[layer], moments.output[layer]),
        )
        for layer in sorted(moments.key)
    ]


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
        prog="sparsekv-calibrate", description="Calibrate the basis of a model's cache."
    )
    parser.add_argument("model", help="folder or name of a Hugging Face model")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="UTF-8 files, like what is served"
    )
    parser.add_argument("--output", type=Path, default=Path("basis.safetensors"))
    parser.add_argument(
        "--tokens", type=int, default=16384, help="in equal parts of all texts (default 16384)"
    )
    parser.add_argument("--length", type=int, default=1024, help="of one sample (default 1024)")
    parser.add_argument(
        "--context", type=int, help="positions to calibrate for (default: all the model has)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    largest = args.tokens // len(args.text)
    if not 1 < args.length <= largest:
        parser.error(f"--length {args.length}: must be > 1 and <= {largest}, a text's --tokens")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        each = args.tokens // len(args.text)
        texts = [text_samples(tokenizer, path, each, args.length) for path in args.text]
        samples = torch.cat(texts)
        # Few CPUs multiply in half precision at speed.
        dtype = torch.float32 if args.device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        largest = model.config.max_position_embeddings
        context = largest if args.context is None else args.context
        if not args.length <= context <= largest:
            raise ValueError(
                f"--context {context}: must be >= {args.length} (--length) and <= {largest}"
            )
        layers = calibrate(model.eval().to(args.device), samples, context)
        write_basis(args.output, layers, Path(args.model).name)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    condition = torch.linalg.cond(torch.stack([torch.stack(layer) for layer in layers]))
    print(
        f"{args.output}: {len(layers)} layers, {samples.numel()} tokens, "
        f"condition {condition.median():.1f} median, {condition.max():.1f} largest"
    )


if __name__ == "__main__":
    main()
