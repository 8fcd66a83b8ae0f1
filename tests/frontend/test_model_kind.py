"""Whether a model has experts, from its config alone."""

from __future__ import annotations

from pathlib import Path

from moec.frontend.model_kind import ModelKind, model_shape
from tests.frontend.tiny_models import EXPERT_COUNT, TINY_MODELS, tiny_config


def test_every_architecture_is_told_apart(tmp_path: Path) -> None:
    for name, model in TINY_MODELS.items():
        folder = tmp_path / name
        tiny_config(name).save_pretrained(folder)
        shape = model_shape(folder)
        assert (shape.kind is ModelKind.MOE) == model.is_mixture, name
        assert shape.experts % EXPERT_COUNT == 0 and shape.layers >= 2, name
