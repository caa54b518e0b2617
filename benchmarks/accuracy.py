"""How much quality a cache costs: the torch route on a Hugging Face model, all rivals on one text.

    python benchmarks/accuracy.py perplexity          # held-out texts, every method, then the plot
    python benchmarks/accuracy.py perplexity --texts tuning --methods sparsekv-balanced dense
    python benchmarks/accuracy.py perplexity --texts my.txt --samples 2 --length 8192
    python benchmarks/accuracy.py perplexity --basis basis.safetensors    # also calibrated presets
    python benchmarks/accuracy.py passkey
    python benchmarks/accuracy.py tasks longbench.jsonl
    python benchmarks/accuracy.py engine              # the same texts through vLLM itself
    python benchmarks/accuracy.py plot
    python benchmarks/accuracy.py damage offset-100-slow FOLDER   # a model hard to quantise

Results are written after every evaluation, Ctrl-C loses at most one, and a second run continues
where the first stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError

import torch
from common import save
from quality import engine, pareto, tasks
from quality.attention import RuleModel
from quality.damaged import DAMAGES, damage
from quality.methods import Method, Shape, build_methods
from quality.perplexity import compare, dense_log_probabilities, summary, token_samples
from quality.results import Results
from texts.fetch import HELD_OUT, TUNING, fetch
from transformers import AutoConfig, AutoTokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def find_texts(names: list[str], folder: Path) -> dict[str, Path]:
    """Text files by name: a group, a text of a group (both fetched if missing), or a path.

    Raises:
        ValueError: neither a known text nor a file.
    """
    groups = {"held-out": HELD_OUT, "tuning": TUNING}
    paths: dict[str, Path] = {}
    for name in names:
        if name in groups or name in TUNING + HELD_OUT:
            paths |= fetch(folder, groups.get(name, (name,)))
        elif Path(name).is_file():
            paths[Path(name).stem] = Path(name)
        else:
            known = [*groups, *TUNING, *HELD_OUT]
            raise ValueError(f"text {name!r}: must be a file or one of {known}")
    return paths


def choose_methods(
    names: list[str] | None, shape: Shape, dtype: torch.dtype, basis: Path | None = None
) -> dict[str, Method]:
    """Methods by name, all by default.

    Raises:
        ValueError: unknown name.
    """
    methods = build_methods(shape, dtype, basis=basis)
    for name in names or ():
        if name not in methods:
            raise ValueError(f"method {name!r}: must be one of {list(methods)}")
    return {name: methods[name] for name in names or methods}


def perplexity(args: argparse.Namespace) -> None:
    """Perplexity ratio, KL and top-1 of every method, one sample of every text after the other."""
    dtype = DTYPES[args.dtype]
    model = RuleModel(args.model, dtype)
    methods = choose_methods(args.methods, model.shape, dtype, args.basis)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    window = max(method.window for method in methods.values())
    paths = find_texts(args.texts, args.text_folder)
    samples = {
        name: token_samples(tokenizer, path, args.samples, args.length, window)
        for name, path in paths.items()
    }
    results = Results(args.out)
    codecs = {name: method.codec(model.shape, dtype) for name, method in methods.items()}
    dense_bytes = 2 * model.head_size * dtype.itemsize
    for index in range(args.samples):
        for text, tokens in samples.items():
            if index >= len(tokens):
                continue
            digest = hashlib.sha256(tokens[index].numpy().tobytes()).hexdigest()[:16]
            dense = None
            for name, method in methods.items():
                key = {
                    "model": Path(args.model).name,
                    "dtype": args.dtype,
                    "text": text,
                    "tokens_sha256": digest,
                    "length": args.length,
                    "sample": index,
                    "chunk": args.chunk,
                    "method": name,
                    "vector_bytes": method.vector_bytes,
                    "window": method.window,
                    "token_bytes": method.token_bytes(dense_bytes, pareto.SHORT_CONTEXT),
                    "settings": method.settings,
                    "codec": codecs[name],
                }
                if results.has(key):
                    continue
                start = time.perf_counter()
                if dense is None:
                    dense = dense_log_probabilities(model, tokens[index])
                hidden = model.hidden(tokens[index], method, args.chunk)
                sums = compare(model, tokens[index], dense, hidden)
                results.add(key, sums)
                row = summary([sums])
                print(
                    f"{text} {index + 1}/{args.samples} {name}: ratio {row['ppl_ratio']:.4f} "
                    f"kl {row['kl']:.4f} top-1 {row['top1']:.3f} "
                    f"({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    pareto.write(args.out, Path(args.model).name, methods, model.shape, dtype)


def stream(path: Path, rows: Callable[[list[tasks.Row]], Iterator[tasks.Row]]) -> list[tasks.Row]:
    """Append rows to a JSON file one by one; ``rows`` gets those the file already holds."""
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for row in rows(list(done)):
        print(row, flush=True)
        done.append(row)
        save(path, done)
    return done


def passkey(args: argparse.Namespace) -> None:
    """Retrieval of a number hidden at several depths of several lengths."""
    dtype = DTYPES[args.dtype]
    model = RuleModel(args.model, dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    methods = choose_methods(args.methods, model.shape, dtype, args.basis)
    rows = stream(
        args.out.with_name("passkey.json"),
        partial(tasks.passkey, model, tokenizer, methods, args.lengths, args.depths),
    )
    for row in tasks.means(rows, ("method", "length"), ("found",)):
        print(row)


def run_tasks(args: argparse.Namespace) -> None:
    """Answers to the questions of LongBench or RULER files, scored."""
    dtype = DTYPES[args.dtype]
    questions = {path: tasks.read_jsonl(path) for path in args.files}
    model = RuleModel(args.model, dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    methods = choose_methods(args.methods, model.shape, dtype, args.basis)
    rows = stream(
        args.out.with_name("tasks.json"),
        partial(tasks.answer_files, model, tokenizer, methods, questions, args.max_new_tokens),
    )
    for row in tasks.means(rows, ("file", "method"), tasks.SCORES):
        print(row)


def run_engine(args: argparse.Namespace) -> None:
    """Perplexity of one sample per text through vLLM, beside the torch route in equal steps."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    paths = find_texts(args.texts, args.text_folder)
    samples = {
        name: token_samples(tokenizer, path, 1, args.length, 1)[0] for name, path in paths.items()
    }
    settings = dict(args.settings)
    if args.basis:
        settings["basis"] = str(args.basis)
    rows = engine.compare_routes(args.model, samples, settings, DTYPES[args.dtype])
    save(args.out.with_name("engine_accuracy.json"), rows)


def plot(args: argparse.Namespace) -> None:
    """Redraw the picture and the table from the results at hand."""
    shape = Shape.of(AutoConfig.from_pretrained(args.model))
    dtype = DTYPES[args.dtype]
    methods = build_methods(shape, dtype, basis=args.basis)
    pareto.write(args.out, Path(args.model).name, methods, shape, dtype)


def run_damage(args: argparse.Namespace) -> None:
    """Write a copy of the model whose keys or values are hard to quantise."""
    damage(args.name, args.model, args.folder)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--model", default=str(here.parent / ".cache/smollm2-135m-instruct"))
        sub.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="dense cache dtype")
        sub.add_argument(
            "--basis", type=Path, help="file of sparsekv-calibrate: also measure calibrated presets"
        )
        sub.add_argument("--out", type=Path, default=here / "results/accuracy.json")
        sub.add_argument("--threads", type=int, help="torch threads (default: torch's)")
        return sub

    def with_texts(sub: argparse.ArgumentParser, length: int) -> None:
        sub.add_argument("--texts", nargs="+", default=["held-out"], help="groups, names or files")
        sub.add_argument("--text-folder", type=Path, default=here.parent / ".cache/texts")
        sub.add_argument("--length", type=int, default=length, help="tokens of one sample")

    sub = command("perplexity", perplexity)
    with_texts(sub, 2048)
    sub.add_argument("--samples", type=int, default=6, help="samples of each text")
    sub.add_argument("--chunk", type=int, default=1, help="tokens of one step")
    sub.add_argument("--methods", nargs="+")
    sub = command("passkey", passkey)
    sub.add_argument("--methods", nargs="+")
    sub.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048], help="tokens")
    sub.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.5, 0.9])
    sub = command("tasks", run_tasks)
    sub.add_argument("files", nargs="+", type=Path, help="JSONL")
    sub.add_argument("--methods", nargs="+")
    sub.add_argument("--max-new-tokens", type=int, default=32)
    sub = command("engine", run_engine)
    with_texts(sub, 512)
    sub.set_defaults(dtype="float32")
    sub.add_argument(
        "--settings", type=json.loads, default={}, help="what stands under sparsekv (JSON)"
    )
    command("plot", plot)
    sub = command("damage", run_damage)
    sub.add_argument("name", choices=DAMAGES)
    sub.add_argument("folder", type=Path, help="of the copy")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        args.function(args)
    except (ValueError, OSError, CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {args.out} holds what is done, run again to continue")


if __name__ == "__main__":
    main()
