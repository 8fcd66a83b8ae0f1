"""A dense model of 500 million parameters becomes one of experts: `python -m tests.benchmarks.large_dense`.

A synthetic Llama folder (random weights, tokenizer of `tiny-dense`) is written to a temporary folder and compiled with
a partition by k-means, a least-squares router and a calibrated scale. The script prints minutes, the most anonymous
memory that the process held, how much of it a tiny model needs too (the interpreter and its libraries), and the rest
in layers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

from tests.slow.memory import WatchedRun, run_moec

TOKENIZER = Path(__file__).parents[2] / "examples" / "models" / "tiny-dense"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DenseShape:
    """Sizes of a Llama decoder with a tied head; the defaults are 502 million parameters."""

    layers: int = 20
    hidden: int = 1536
    width: int = 4096
    heads: int = 16
    key_heads: int = 4
    vocabulary: int = 4096

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_heads * head
        return attention + 3 * self.hidden * self.width + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, the embedding table counted once."""
        return self.layers * self.layer_parameters + (self.vocabulary + 1) * self.hidden


def write_model(folder: Path, shape: DenseShape, dtype: str) -> None:
    """Writes the model, one file for each layer, with normal numbers of the size that keeps activations near 1."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden, "intermediate_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "hidden_act": "silu",
        "head_dim": shape.hidden // shape.heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": dtype, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    keys = shape.key_heads * (shape.hidden // shape.heads)

    def write(file: str, tensors: dict[str, tuple[int, ...]]) -> None:
        made = {}
        for name, sizes in tensors.items():
            if len(sizes) == 1:
                made[name] = torch.ones(sizes).to(DTYPES[dtype])
            else:
                made[name] = (torch.randn(sizes, generator=generator) * sizes[1] ** -0.5).to(DTYPES[dtype])
            places[name] = file
        save_file(made, folder / file, metadata={"format": "pt"})

    write(
        "outside.safetensors",
        {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)},
    )
    for number in range(shape.layers):
        at = f"model.layers.{number}"
        tensors: dict[str, tuple[int, ...]] = {
            f"{at}.input_layernorm.weight": (shape.hidden,),
            f"{at}.post_attention_layernorm.weight": (shape.hidden,),
            f"{at}.self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            f"{at}.self_attn.k_proj.weight": (keys, shape.hidden),
            f"{at}.self_attn.v_proj.weight": (keys, shape.hidden),
            f"{at}.self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            f"{at}.mlp.gate_proj.weight": (shape.width, shape.hidden),
            f"{at}.mlp.up_proj.weight": (shape.width, shape.hidden),
            f"{at}.mlp.down_proj.weight": (shape.hidden, shape.width),
        }
        write(f"layer-{number:02d}.safetensors", tensors)
    index = {"metadata": {"total_size": shape.parameters * DTYPES[dtype].itemsize}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def convert(folder: Path, source: Path, *, experts: int, k: int, tokens: int, check: str, verify: bool) -> WatchedRun:
    """Compiles `source` to experts in a process of its own, all files in `folder`."""
    folder.mkdir()
    pipeline = (
        f"calibrate{{sequences={tokens // 64} length=64 reservoir={tokens}}},factorize{{experts={experts}}},"
        f"init-router,set-routing{{k={k} scale=calibrated}}"
    )
    arguments = ["compile", str(source), "-o", str(folder / "out"), "--store", str(folder / "store"), "--time-passes"]
    arguments += ["--check", check, "--verify" if verify else "--no-verify", "--pipeline", pipeline]
    return run_moec(arguments, folder / "log")


def table(shape: DenseShape, run: WatchedRun, tiny: WatchedRun) -> str:
    """What the run took, beside that of a tiny model, as text."""
    layer = 4 * shape.layer_parameters
    more = run.peak_bytes - tiny.peak_bytes
    return (
        f"{shape.parameters / 1e6:.0f} million parameters, {shape.layers} layers of {layer / 2**20:.0f} MiB\n"
        f"minutes {run.seconds / 60:.1f}, exit code {run.exit_code}, RssAnon {run.peak_bytes / 2**20:.0f} MiB at most, "
        f"of a tiny model {tiny.peak_bytes / 2**20:.0f} MiB: {more / layer:.1f} layers more"
    )


def main() -> None:
    """Reads the command line, converts and prints."""
    parser = argparse.ArgumentParser(description="A large dense model becomes one of experts: minutes and memory.")
    parser.add_argument("--layers", type=int, default=DenseShape.layers)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the source")
    parser.add_argument("--check", choices=("none", "changed", "full"), default="none", help="as of moec compile")
    parser.add_argument("--verify", action="store_true", help="also run the artifact against the source")
    arguments = parser.parse_args()
    shape = DenseShape(layers=arguments.layers)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", shape, arguments.dtype)
        runs = [
            convert(
                folder / f"of {source.name}",
                source,
                experts=arguments.experts,
                k=arguments.k,
                tokens=arguments.tokens,
                check=arguments.check,
                verify=arguments.verify,
            )
            for source in (folder / "model", TOKENIZER)
        ]
        print(runs[0].output)
        print(table(shape, *runs))


if __name__ == "__main__":
    main()
