"""A tiny checkpoint, compiled once for both ONNX targets, beside what transformers makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moec.artifact.compilation import compile_folder
from moec.artifact.options import Check, CompileOptions
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import Target
from moec.ir import TensorType
from moec.module import Module
from moec.reference.executor import Executor
from tests.frontend.tiny_models import TINY_MODELS, random_tokens, save_tiny_checkpoint
from tests.parity.onnx_session import Ids, Logits, OnnxSession, positions
from tests.parity.source_model import SourceModel

LENGTH = 20  # longer than the sliding windows of the tiny models


@dataclass
class CompiledModel:
    """One architecture in all its forms."""

    folder: Path
    source: SourceModel
    module: Module
    onnx: dict[Target, OnnxSession]

    def emit_fused(self, folder: Path) -> OnnxSession:
        """The model with the fused operator for every layer of experts, which few experts would not get otherwise."""
        report = emit_onnx(self.module, folder, target=Target.ORT_CPU, lowering=Lowering.FUSED)
        refused = [layer.choice.reason for layer in report.layers if layer.choice.lowering is not Lowering.FUSED]
        assert report.layers and not refused, refused
        return OnnxSession.load(folder / "model.onnx")

    def execute(self, ids: Ids, mask: Ids) -> Logits:
        """Logits, or hidden states of an encoder, from the reference executor."""
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        given["token_type_ids"] = segments(ids)
        main = self.module.main
        inputs = {name: torch.from_numpy(given[name]) for name in main.arg_names if name in given}
        for name, argument in zip(main.arg_names, main.arguments, strict=True):
            if name.startswith("past_key_values."):
                assert isinstance(argument.type, TensorType)
                _, heads, _, size = argument.type.shape
                inputs[name] = torch.zeros(len(ids), int(str(heads)), 0, int(str(size)))
        with torch.no_grad():
            results = Executor(self.module.op, self.module.weights).run(inputs)
        return next(iter(results.values())).numpy()


def compile_tiny_model(model_type: str, root: Path) -> CompiledModel:
    """Saves the tiny model in `root`, compiles it for both targets and loads all its forms."""
    checkpoint = root / model_type
    artifact = root / "portable"
    save_tiny_checkpoint(model_type, checkpoint)
    result = compile_folder(
        checkpoint, artifact, CompileOptions(target=Target.PORTABLE.value, check=Check.NONE, verify=False)
    )
    other = root / "ort-cpu"
    emit_onnx(result.module, other, target=Target.ORT_CPU)
    sessions = {
        Target.PORTABLE: OnnxSession.load(artifact / "onnx" / "model.onnx"),
        Target.ORT_CPU: OnnxSession.load(other / "model.onnx"),
    }
    source = SourceModel.load(checkpoint, is_encoder=TINY_MODELS[model_type].is_encoder)
    return CompiledModel(checkpoint, source, result.module, sessions)


def padded_batch(left: bool) -> tuple[Ids, Ids]:
    """Tokens [3, LENGTH] and their mask: one whole row, and two shorter ones padded on the `left` or on the right."""
    ids = random_tokens(3, LENGTH, seed=1).numpy()
    mask = np.ones_like(ids)
    for row, padding in ((1, 5), (2, 11)):
        mask[row, slice(None, padding) if left else slice(LENGTH - padding, None)] = 0
    return ids * mask, mask


def segments(ids: Ids) -> Ids:
    """Token types of two segments, as encoders take them."""
    types = np.zeros_like(ids)
    types[:, ids.shape[1] // 2 :] = 1
    return types
