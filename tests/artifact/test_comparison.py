"""Layers of an artifact against those of its source: what routers chose, how far experts are off."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moec.api import run_passes
from moec.artifact.comparison import compare_layers
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
