"""One trace for each config and test process: tracing takes seconds, and most tests are about what comes after it.

The tests of the frontend trace anew, as do all tests that start a process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moec.frontend.empty_model import EmptyModel
    from moec.frontend.model_config import ModelSource
    from moec.frontend.trace import TracedModel

FRONTEND = Path(__file__).parent / "frontend"

_TRACES: dict[tuple[type, str], TracedModel] = {}


@pytest.fixture(autouse=True)
def one_trace_for_each_config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported for it: a test that is the first to load a model traces for itself."""
    huggingface = sys.modules.get("moec.frontend.huggingface")
    if huggingface is None or FRONTEND in request.path.parents:
        return
    from moec.frontend.trace import trace_model

    def traced_once(source: ModelSource, empty: EmptyModel) -> TracedModel:
        key = (source.model_class, json.dumps(source.config.to_dict(), sort_keys=True, default=str))
        if key not in _TRACES:
            _TRACES[key] = trace_model(source, empty)
        return _TRACES[key]

    monkeypatch.setattr(huggingface, "trace_model", traced_once)
