"""The example of a user's own mixture of experts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_module.py"


def test_own_module_becomes_routed_experts_in_onnx(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"moe.route"') == 1
    assert done.stdout.count('"moe.experts"') == 1
    found = re.search(r"largest difference (\S+) of logits up to (\S+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= 1e-4 * float(found[2])
    assert (tmp_path / "out" / "model.onnx").is_file()
