"""Every architecture: the reference executor and both ONNX targets against transformers, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.codegen.onnx.targets import Target
from tests.frontend.tiny_models import DENSE_MODEL_TYPES, MIXTURE_MODEL_TYPES, TINY_MODELS
from tests.parity.comparison import assert_close, assert_same_logits, relative_difference
from tests.parity.compiled_model import LENGTH, CompiledModel, compile_tiny_model, padded_batch, segments

ALWAYS = ("llama", "bert", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
TARGETS = [pytest.param(target, id=target.value) for target in Target]


def _parameters(names: tuple[str, ...]) -> list[Any]:
    """Test parameters; the architectures that `make test` leaves out are marked slow, all of one run in one process."""
    return [
        pytest.param(
            name, marks=[pytest.mark.xdist_group(name), *([] if name in ALWAYS else [pytest.mark.slow])], id=name
        )
        for name in names
    ]


DECODERS = _parameters(tuple(name for name, model in TINY_MODELS.items() if not model.is_encoder))
ENCODERS = _parameters(tuple(name for name, model in TINY_MODELS.items() if model.is_encoder))
MIXTURES = _parameters(MIXTURE_MODEL_TYPES)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return compile_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("compiled", DECODERS, indirect=True)
class TestDecoder:
    def test_executor(self, compiled: CompiledModel) -> None:
        ids, mask = padded_batch(left=True)
        assert_same_logits(compiled.execute(ids, mask), compiled.source.logits(ids, mask), mask)

    @pytest.mark.parametrize("target", TARGETS)
    def test_prefill(self, compiled: CompiledModel, target: Target) -> None:
        ids, mask = padded_batch(left=True)
        assert_same_logits(compiled.onnx[target].prefill(ids, mask), compiled.source.logits(ids, mask), mask)

    @pytest.mark.parametrize("target", TARGETS)
    def test_token_by_token(self, compiled: CompiledModel, target: Target) -> None:
        ids, mask = padded_batch(left=True)
        longest_padding = int((mask == 0).sum(axis=1).max())
        logits = compiled.onnx[target].decode(ids, mask, first=longest_padding + 1)
        assert_same_logits(logits, compiled.source.logits(ids, mask), mask)

    @pytest.mark.parametrize("target", TARGETS)
    def test_from_the_first_token_on(self, compiled: CompiledModel, target: Target) -> None:
        ids = padded_batch(left=True)[0][:1]
        mask = np.ones_like(ids)
        session = compiled.onnx[target]
        assert_same_logits(session.decode(ids, mask), session.prefill(ids, mask), mask)

    @pytest.mark.parametrize("target", TARGETS)
    def test_rows_do_not_disturb_each_other(self, compiled: CompiledModel, target: Target) -> None:
        ids, mask = padded_batch(left=True)
        together = compiled.onnx[target].prefill(ids, mask)
        for row in range(len(ids)):
            first = int(np.flatnonzero(mask[row])[0])
            alone = compiled.onnx[target].prefill(ids[row : row + 1, first:], mask[row : row + 1, first:])
            assert_close(together[row : row + 1, first:], alone, mask[row : row + 1, first:])


@pytest.mark.parametrize("compiled", ENCODERS, indirect=True)
class TestEncoder:
    def test_executor(self, compiled: CompiledModel) -> None:
        ids, mask = padded_batch(left=False)
        assert_close(compiled.execute(ids, mask), compiled.source.hidden(ids, mask, segments(ids)), mask)

    @pytest.mark.parametrize("target", TARGETS)
    def test_hidden_states(self, compiled: CompiledModel, target: Target) -> None:
        ids, mask = padded_batch(left=False)
        actual = compiled.onnx[target].encode(ids, mask, segments(ids))
        assert_close(actual, compiled.source.hidden(ids, mask, segments(ids)), mask)


@pytest.mark.parametrize("compiled", MIXTURES, indirect=True)
class TestExperts:
    """The checkpoints are such that a lost expert would be seen."""

    def test_every_used_expert_counts(self, compiled: CompiledModel) -> None:
        ids, mask = padded_batch(left=True)
        source = compiled.source
        whole = source.logits(ids, mask)[mask.astype(bool)]
        layers, used = source.expert_modules(), source.used_experts(ids, mask)
        assert len(layers) == len(used) > 0
        for layer, experts in zip(layers, used, strict=True):
            assert len(experts) > 2
            for expert in experts:
                without = source.logits_without_expert(layer, int(expert), ids, mask)[mask.astype(bool)]
                assert relative_difference(without, whole) >= 0.01, f"expert {expert} hardly matters"

    def test_fused_operator(self, compiled: CompiledModel, tmp_path: Path) -> None:
        ids, mask = padded_batch(left=True)
        session = compiled.emit_fused(tmp_path)
        expected = compiled.source.logits(ids, mask)
        assert_same_logits(session.prefill(ids, mask), expected, mask)
        longest_padding = int((mask == 0).sum(axis=1).max())
        assert_same_logits(session.decode(ids, mask, first=longest_padding + 1), expected, mask)


def test_the_batches_are_longer_than_the_windows() -> None:
    windows = [model.settings["sliding_window"] for model in TINY_MODELS.values() if "sliding_window" in model.settings]
    assert windows
    assert all(window is None or window < LENGTH - 11 for window in windows)


def test_every_architecture_is_covered() -> None:
    assert set(DENSE_MODEL_TYPES) | set(MIXTURE_MODEL_TYPES) == set(TINY_MODELS)
    assert set(ALWAYS) <= set(TINY_MODELS)
