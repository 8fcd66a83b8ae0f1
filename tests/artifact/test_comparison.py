"""Layers of an artifact against those of its source: what routers chose, how far experts are off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from moec.api import run_passes
from moec.artifact.comparison import compare_layers, stored_bits
from moec.codegen.onnx.emit import MODEL_FILE, emit_onnx
from moec.experts import find_moe_layers, load_expert
from moec.passes.factoring.sides import Side, dense_matrix
from tests.experts.models import calibrate_text, copy_of, raised_model


def test_replicas_are_no_choice_of_the_router(tmp_path: Path) -> None:
    source = raised_model("mixtral", tmp_path)
    changed = copy_of(source)
    run_passes(changed, f"{calibrate_text(tmp_path)},make-replicas{{group=16 method=rtn high=0.4 low=0.5}}")
    windows = np.random.default_rng(0).integers(0, 50, (4, 16))
    same, rows = (compare_layers(source, other, windows, 2) for other in (source, changed))
    assert all(row.agreement == row.same == 1 for row in same)
    assert all(expert.relative_error in (0, None) for row in same for expert in row.experts)
    # the first layer reads equal rows, and a low replica, or none, in the place of an expert is no other choice
    assert rows[0].agreement == rows[0].same == 1
    assert len(rows) == len(same) > 1 and all(row.tokens == windows.size for row in rows)
    used = [expert for expert in rows[0].experts if expert.tokens]
    assert used and all(expert.relative_error == 0 for expert in used)
    assert all(expert.low_replica_error is not None and 0.05 < expert.low_replica_error < 2 for expert in used)


def test_bytes_that_tensors_share_count_once(tmp_path: Path) -> None:
    module = raised_model("mixtral", tmp_path)
    emit_onnx(module, tmp_path / "onnx")
    file = tmp_path / "onnx" / MODEL_FILE
    before = stored_bits(module, module, file)
    experts = [load_expert(layer, module.weights, n) for layer in find_moe_layers(module.op) for n in range(8)]
    weights = sum(dense_matrix(expert, side).numel() for expert in experts for side in Side)  # type: ignore[arg-type]
    assert before.expert_weights == weights and before.expert_bytes == 4 * weights
    assert before.expert_bits_per_weight == 32
    assert before.padding_bytes >= 0
    model = onnx.load(file, load_external_data=False)
    copy = onnx.TensorProto()
    copy.CopyFrom(next(item for item in model.graph.initializer if ".experts" in item.name and item.external_data))
    copy.name += ".again"
    model.graph.initializer.append(copy)
    file.write_bytes(model.SerializeToString())
    after = stored_bits(module, module, file)
    assert after.expert_bytes == before.expert_bytes and after.padding_bytes == before.padding_bytes
