"""``sparsekv-calibrate MODEL``: calibrate the basis in which a model's keys and values lose least.

The command runs the Hugging Face model once over a text; it needs transformers, and not vLLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sparsekv.calibration.moments import calibrate
from vllm_sparsekv.format.basis_file import write_basis


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
