"""Whole models in few bits: bytes, quality and speed of artifacts, beside float32, transformers and onnxruntime.

    python -m tests.quality.packed_models                          # all three models, in this order
    python -m tests.quality.packed_models --model demo --rows 4,3  # some
    python -m tests.quality.packed_models --artifacts FOLDER       # artifacts stay there, and are not made again

The demo model, SmolLM2-135M with its blocks cut into 8 experts of which 4 are chosen (as a checkpoint that the recipe
`best` for dense models makes of it first, from which all rows are compiled), and all-MiniLM-L6-v2. Experts take the
recipes `best4`, `best3` and `best2`; mixed bits are those that `mxmoe-like` chooses; attention, embeddings and head are
packed to nearest codes in one row. The encoder has no experts: all of its weights are packed, its blocks by GPTQ; mixed
bits are 8 for attention and embeddings and 3 for blocks.

Loss is nats per token of held-out text through the artifact's cache; for the encoder it is the mean of 1 - cosine to
the float32 embeddings of sentences. Agreement is the share of a token's experts that the routers of source and artifact
choose alike. Speeds are CPU seconds on one thread in rounds that take turns, as multiples of the float32 artifact's.
SmolLM2's weights come from a 4-bit grid, so its losses say nothing about 4 bits.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from transformers import AutoModel, AutoModelForCausalLM

from moec.artifact.evaluation import evaluate_artifact
from moec.artifact.generation import embed
from moec.artifact.loss import LossSettings, artifact_scorer, measure_loss
from moec.artifact.runtime import OnnxModel
from moec.artifact.text import TextCodec
from moec.frontend.model_kind import ModelKind
from moec.pipeline.recipes import find_recipe
from tests.benchmarks.machine import cpu_seconds
from tests.quality.harness import EXAMPLE_TEXTS, REPOSITORY
from tests.slow.packages import minilm_folder, smollm2_folder

DECODE, PREFILL = 1, 128
FLOAT, TORCH, RUNTIME = "float32", "transformers", "onnxruntime, 4"
_LOSS = LossSettings(window=128, limit=4096, chunk=64, batch=8)
_SENTENCES = 64
_ROUNDS = 9


@dataclass(frozen=True)
class Subject:
    """A model, held-out text, and the arguments of `moec compile` for each row of its table."""

    package: Callable[[], Path]
    heldout: Path
    rows: dict[str, tuple[str, ...]]
    is_dense: bool = False
    is_encoder: bool = False

    def source(self, folder: Path) -> Path:
        """The checkpoint of the table: the package's, or the one with experts that is made of it in `folder`."""
        if not self.is_dense:
            return self.package()
        output = folder / "experts"
        if not (output / "huggingface").is_dir():
            _compile(self.package(), output, folder, "--emit", "huggingface", "--recipe", "best")
        return output / "huggingface"


def _experts(calibrate: str = "calibrate") -> dict[str, tuple[str, ...]]:
    def behind(recipe: str) -> str:
        return f"{calibrate},{find_recipe(recipe, ModelKind.MOE).text().partition(',')[2]}"

    pipelines = {"8": "quantize{bits=8}", **{str(bits): behind(f"best{bits}") for bits in (4, 3, 2)}}
    pipelines["mixed"] = behind("mxmoe-like")
    pipelines["4, all weights"] = f"{pipelines['4']},quantize{{bits=4 what=attention,embedding}}"
    rows = {name: ("--pipeline", text) for name, text in pipelines.items()}
    rows["4, int8 activations"] = (*rows["4"], "--activations", "int8")
    return {FLOAT: (), **rows}


def _encoder() -> dict[str, tuple[str, ...]]:
    def packed(bits: int, what: str = "all") -> str:
        return f"quantize{{bits={bits} what={what} method=gptq damping=0.01}}"

    texts = {str(bits): f"calibrate,{packed(bits)}" for bits in (8, 4, 3, 2)}
    texts["mixed"] = f"calibrate,{packed(3, 'dense')},quantize{{bits=8 what=attention,embedding}}"
    rows = {name: ("--pipeline", text) for name, text in texts.items()}
    rows["4, int8 activations"] = (*rows["4"], "--activations", "int8")
    return {FLOAT: (), **rows}


SUBJECTS = {
    "demo": Subject(
        lambda: REPOSITORY / "examples" / "models" / "tiny-moe", EXAMPLE_TEXTS / "kjv.heldout.txt", _experts()
    ),
    "smollm2": Subject(
        smollm2_folder, EXAMPLE_TEXTS / "kjv.heldout.txt", _experts("calibrate{sequences=32 length=64}"), is_dense=True
    ),
    "minilm": Subject(minilm_folder, EXAMPLE_TEXTS / "kjv.heldout.txt", _encoder(), is_encoder=True),
}


@dataclass
class Row:
    """One line of the table; None where a column does not apply. `seconds` by tokens, one number for each round."""

    name: str
    bytes: int
    loss: float
    agreement: float | None
    call: Callable[[NDArray[np.int64]], object]
    seconds: dict[int, list[float]]


def measure(subject: Subject, names: list[str], folder: Path) -> list[Row]:
    """Makes what is not there, and measures it."""
    rows = [_artifact_row(subject, name, _artifact(subject, name, folder), folder) for name in names]
    rows.append(_runtime_row(subject, folder))
    rows.append(_torch_row(subject, subject.source(folder)))
    generator = np.random.default_rng(0)
    for number in range(-1, _ROUNDS):
        for tokens in (DECODE, PREFILL):
            for row in rows:
                ids = generator.integers(100, 250, (1, tokens))
                seconds = cpu_seconds(lambda row=row, ids=ids: row.call(ids))
                if number >= 0:
                    row.seconds.setdefault(tokens, []).append(seconds)
    return rows


def table(rows: list[Row]) -> str:
    """The table as Markdown."""
    base = {tokens: statistics.median(rows[0].seconds[tokens]) for tokens in (DECODE, PREFILL)}
    lines = [f"| bits | MB | loss | routers | {DECODE} token | {PREFILL} tokens |", "|---|---|---|---|---|---|"]
    for row in rows:
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        faster = " | ".join(f"{base[tokens] / statistics.median(found):.2f}" for tokens, found in row.seconds.items())
        lines.append(f"| {row.name} | {row.bytes / 1e6:.2f} | {row.loss:.4f} | {agreement} | {faster} |")
    return "\n".join(lines)


def _artifact(subject: Subject, name: str, folder: Path, target: str = "ort-cpu") -> Path:
    output = folder / f"{name.replace(', ', '-').replace(' ', '-')}.{target}"
    if not (output / "onnx" / "model.onnx").is_file():
        _compile(subject.source(folder), output, folder, "--target", target, *subject.rows[name])
    return output


def _compile(source: Path, output: Path, folder: Path, *options: str) -> None:
    command = ["compile", str(source), "-o", str(output), "--store", str(folder / "store")]
    command += ["--check", "none", "--no-verify", *options]
    subprocess.run([sys.executable, "-m", "moec", *command], check=True, stdout=subprocess.DEVNULL)


def _artifact_row(subject: Subject, name: str, artifact: Path, folder: Path) -> Row:
    path = artifact / "onnx" / "model.onnx"
    model = OnnxModel(path, threads=1)
    agreement = None
    if subject.is_encoder:
        loss = _distance(subject, model, folder)
    else:
        found = evaluate_artifact(artifact, [subject.heldout], _LOSS, compare=True, store=folder / "store", threads=1)
        loss = next(row.nats_per_token for row in found.losses if row.subject == "artifact")
        shares = [router.agreement for router in found.comparison.routers if router.agreement is not None]
        agreement = statistics.mean(shares) if shares else None
    return Row(name, _bytes(path), loss, agreement, _call(model), {})


def _runtime_row(subject: Subject, folder: Path) -> Row:
    """The portable float32 artifact by onnxruntime's own quantiser: 4 bits in groups of 32.

    In that form each expert is a `Gemm` with a constant matrix; the quantiser looks for `MatMul`, which they become.
    """
    path = folder / "onnxruntime" / "model.onnx"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        source = _artifact(subject, FLOAT, folder, "portable") / "onnx"
        quantizer = MatMulNBitsQuantizer(_with_products(onnx.load(source / "model.onnx")), 4, 32, is_symmetric=False)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
        for item in source.iterdir():
            if item.suffix == ".json":
                (path.parent / item.name).write_bytes(item.read_bytes())
    model = OnnxModel(path, threads=1)
    return Row(RUNTIME, _bytes(path), _loss(subject, model, folder), None, _call(model), {})


def _with_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each `Gemm` with a constant matrix as a `MatMul`, and an `Add` for its bias."""
    constants = {item.name: item for item in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in constants:
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        matrix, name = onnx.numpy_helper.to_array(constants[weight]), f"{weight}.factor"
        matrix = matrix.T if any(item.name == "transB" and item.i == 1 for item in node.attribute) else matrix
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(matrix), name))
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", [x, name], [product], name=node.name))
        nodes += [onnx.helper.make_node("Add", [product, item], list(node.output)) for item in bias]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for name, item in constants.items():
        if name not in used:
            model.graph.initializer.remove(item)
    return model


def _torch_row(subject: Subject, source: Path) -> Row:
    """The source in transformers, float32."""
    torch.set_num_threads(1)
    kind = AutoModel if subject.is_encoder else AutoModelForCausalLM
    model = kind.from_pretrained(source, dtype=torch.float32).eval()

    def call(ids: NDArray[np.int64]) -> object:
        with torch.no_grad():
            return model(torch.from_numpy(ids))

    loss = 0.0
    if not subject.is_encoder:
        tokens = TextCodec(source).read(subject.heldout).ids[: _LOSS.limit + 1]
        inputs = torch.from_numpy(tokens[:-1].reshape(-1, _LOSS.window))
        targets = torch.from_numpy(tokens[1:].reshape(-1, _LOSS.window))
        with torch.no_grad():
            logits = torch.cat([model(part).logits for part in inputs.split(_LOSS.batch)])
        loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten()))
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    return Row(TORCH, size, loss, None, call, {})


def _loss(subject: Subject, model: OnnxModel, folder: Path) -> float:
    if subject.is_encoder:
        return _distance(subject, model, folder)
    text = TextCodec(_artifact(subject, FLOAT, folder) / "onnx").read(subject.heldout)
    return measure_loss(text, "artifact", artifact_scorer(model, _LOSS), _LOSS).nats_per_token


def _distance(subject: Subject, model: OnnxModel, folder: Path) -> float:
    """The mean of 1 - cosine between embeddings of sentences and those of the float32 artifact."""
    source = _artifact(subject, FLOAT, folder) / "onnx"
    codec = TextCodec(source)
    lines = [line for line in subject.heldout.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    prompts = [codec.encode_text("line", line).ids[:64].tolist() for line in lines[:_SENTENCES]]
    wanted, found = embed(OnnxModel(source / "model.onnx", threads=1), prompts), embed(model, prompts)
    return float(1 - (wanted * found).sum(1).mean())


def _call(model: OnnxModel) -> Callable[[NDArray[np.int64]], object]:
    def call(ids: NDArray[np.int64]) -> object:
        mask = np.ones_like(ids)
        return model.step(ids, mask, model.empty_cache(1)) if model.is_decoder else model.encode(ids, mask)

    return call


def _bytes(path: Path) -> int:
    """Of the model and all files of weights beside it."""
    return sum(item.stat().st_size for item in path.parent.iterdir() if item.name.startswith(("model.onnx", "experts")))


def main() -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(description="Whole models in few bits.")
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="only this model; may be repeated")
    parser.add_argument("--rows", help="only these rows, separated by semicolons; float32 always comes first")
    parser.add_argument("--artifacts", type=Path, help="folder that artifacts stay in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.model or SUBJECTS:
            subject = SUBJECTS[name]
            names = [FLOAT, *arguments.rows.split(";")] if arguments.rows else list(subject.rows)
            folder = (arguments.artifacts or Path(scratch)) / name
            folder.mkdir(parents=True, exist_ok=True)
            print(f"\n{name}\n\n{table(measure(subject, names, folder))}", flush=True)


if __name__ == "__main__":
    main()
