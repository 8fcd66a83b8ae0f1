"""What the IR of a Hugging Face folder looks like, checked on tiny checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import ExpertsOp
from moec.dialects.nn import AttentionMaskOp, AttentionOp
from moec.errors import UnsupportedModelError
from moec.frontend.decompositions import decompose
from moec.frontend.graph_importer import ImportNames
from moec.frontend.huggingface import load_huggingface
from moec.frontend.import_graph import ImportOptions, import_program
from moec.ir import DType, TensorType, parse_module, structurally_equal, symbol, verify
from moec.module import Module
from tests.frontend.tiny_models import save_tiny_checkpoint

BATCH, SEQ = symbol("batch"), symbol("seq")


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Module]:
    names = ("gemma2", "bert", "qwen2_moe", "gpt_oss", "deepseek_v3")
    return {
        name: load_huggingface(save_tiny_checkpoint(name, tmp_path_factory.mktemp(name), tie_word_embeddings=False))
        if name == "qwen2_moe"
        else load_huggingface(save_tiny_checkpoint(name, tmp_path_factory.mktemp(name)))
        for name in names
    }


def _ops(module: Module, kind: type[Any]) -> list[Any]:
    return [op for op in module.op.walk() if isinstance(op, kind)]


def test_modules_are_valid_and_survive_text(modules: dict[str, Module]) -> None:
    for module in modules.values():
        verify(module.op)
        assert structurally_equal(parse_module(module.print()), module.op)


def test_signature(modules: dict[str, Module]) -> None:
    assert modules["gemma2"].main.arg_names == ("input_ids", "attention_mask", "position_ids")
    assert modules["gemma2"].main.result_names == ("logits",)
    assert modules["bert"].main.arg_names == ("input_ids", "attention_mask", "token_type_ids")
    assert modules["bert"].main.result_names == ("last_hidden_state",)
    for module in modules.values():
        assert {argument.type for argument in module.main.arguments} == {TensorType((BATCH, SEQ), DType.I64)}


def test_every_layer_has_one_attention_with_its_mask(modules: dict[str, Module]) -> None:
    windows = {name: [mask.window for mask in _ops(module, AttentionMaskOp)] for name, module in modules.items()}
    assert sorted(windows["gemma2"]) == [0, 8]
    assert sorted(windows["gpt_oss"]) == [0, 8]
    assert windows["bert"] == [0]
    # Qwen2-MoE makes a mask for sliding layers, which it does not have
    assert windows["qwen2_moe"] == [0]
    for name, module in modules.items():
        assert len(_ops(module, AttentionOp)) == module.config["num_hidden_layers"]
        for mask in _ops(module, AttentionMaskOp):
            assert mask.causal is (name != "bert")
            assert mask.padding is module.main.argument("attention_mask")
        for attention in _ops(module, AttentionOp):
            assert isinstance(attention.mask.defining_op, AttentionMaskOp)


def test_attention_captures_what_is_special(modules: dict[str, Module]) -> None:
    gemma = _ops(modules["gemma2"], AttentionOp)
    assert [op.softcap for op in gemma] == [5.0, 5.0]
    assert gemma[0].scale == pytest.approx(24**-0.5)
    assert all(isinstance(op.sinks.defining_op, WeightOp) for op in _ops(modules["gpt_oss"], AttentionOp))
    latent = _ops(modules["deepseek_v3"], AttentionOp)[0]
    assert (latent.key.type.shape[3], latent.value.type.shape[3]) == (24, 12)


def test_experts_have_their_body_as_region(modules: dict[str, Module]) -> None:
    experts = _ops(modules["gpt_oss"], ExpertsOp)
    assert len(experts) == 2
    for op in experts:
        assert op.stored == tuple(range(8))
        assert [value.type.static_shape for value in op.weights] == [(8, 64, 192), (8, 192), (8, 96, 64), (8, 64)]
        names = [inner.name for inner in op.regions[0].block]
        # clamped, interleaved SwiGLU with biases, from the model's own code
        assert names.count("aten.linear.default") == 2
        assert names.count("aten.clamp.default") == 2
        assert "aten.sigmoid.default" in names
    assert len(_ops(modules["deepseek_v3"], ExpertsOp)) == 2
    assert len(_ops(modules["qwen2_moe"], ExpertsOp)) == 2


def test_experts_weights_are_lazy_stacks(modules: dict[str, Module]) -> None:
    (first, _) = _ops(modules["qwen2_moe"], ExpertsOp)
    gate_up = first.weights[0].defining_op
    assert "experts.{0:8}." in gate_up.source
    loaded = modules["qwen2_moe"].weights.load(gate_up.source, 3)
    assert loaded.shape == (96, 64)


def test_no_leftovers_of_tracing(modules: dict[str, Module]) -> None:
    """No identities, no uninitialised memory, no dead operations, nothing computed from constants alone."""
    for module in modules.values():
        names = set(module.operation_counts())
        assert not {f"aten.{name}.default" for name in ("clone", "detach", "alias", "copy", "empty")} & names
        assert not {name for name in names if "scatter" in name and "slice" in name}
        for op in module.main.body:
            assert op.has_uses or op.name == "func.return"
            if op.name.startswith("aten.") and op.operands and op.results[0].type.is_static:  # type: ignore[attr-defined]
                makers = [value.defining_op for value in op.operands]
                assert not all(maker is not None and maker.name == "moec.constant" for maker in makers)


def test_slices_have_plain_bounds(modules: dict[str, Module]) -> None:
    for module in modules.values():
        for op in module.op.walk():
            if op.name == "aten.slice.Tensor":
                size = op.operands[0].type.shape[op.attributes["dim"]]  # type: ignore[attr-defined]
                start, end = op.attributes["start"], op.attributes["end"]
                if isinstance(end, int):
                    assert 0 <= start < end <= size
                else:
                    assert (start, end) == (0, SEQ)


def test_tied_weights_are_one(modules: dict[str, Module]) -> None:
    names = [op.weight_name for op in _ops(modules["gemma2"], WeightOp)]
    assert len(names) == len(set(names))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_every_checkpoint_tensor_is_accounted_for(modules: dict[str, Module]) -> None:
    for name, module in modules.items():
        facts = module.source
        assert facts.tensors_used + len(facts.tensors_unused) == facts.tensors_total
        assert set(facts.tensors_unused) == ({"pooler.dense.weight", "pooler.dense.bias"} if name == "bert" else set())


def test_locations_name_the_module_and_the_line(modules: dict[str, Module]) -> None:
    experts = _ops(modules["qwen2_moe"], ExpertsOp)[1].location
    assert experts.name == "model.layers.1.mlp.experts"
    attention = _ops(modules["bert"], AttentionOp)[0].location
    assert attention.name == "encoder.layer.0.attention.self"
    assert attention.file == "transformers/models/bert/modeling_bert.py"
    assert attention.line > 0


def test_equal_folders_give_equal_text(modules: dict[str, Module], tmp_path: Path) -> None:
    again = load_huggingface(save_tiny_checkpoint("gpt_oss", tmp_path / "elsewhere"))
    assert again.print() == modules["gpt_oss"].print()


def _import(module: nn.Module, example: torch.Tensor) -> ModuleOp:
    with torch.no_grad():
        program = decompose(export(module, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=False))
    options = ImportOptions(ImportNames(), {"x": (BATCH, *example.shape[1:])}, ("y",), ())
    return import_program(program, options).module


def test_random_numbers_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(UnsupportedModelError, match="random"):
        _import(Noisy(), torch.zeros(4, 3))


def test_adding_a_boolean_mask_is_refused() -> None:
    class Eager(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            padding = torch.ones(x.shape[0], 3, dtype=torch.int64)
            mask = torch.ops.moec.attention_mask(padding, 3, True, 0, 0)
            result: torch.Tensor = x[:, None, None] + mask.expand(-1, 2, -1, -1)
            return result

    with pytest.raises(UnsupportedModelError, match="boolean"):
        _import(Eager(), torch.zeros(4, 3))


def test_tensors_filled_in_pieces_become_concatenations() -> None:
    class Filled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.empty(x.shape[0], 6)
            y[:, 4:] = x[:, :2]
            y[:, :4] = x
            z = torch.zeros(x.shape[0], 6)
            z[:, 1::2] = y[:, :3]
            z[:, 0] = x[:, 3]
            return y + z

    module = _import(Filled(), torch.zeros(5, 4))
    names = [op.name for op in module.walk()]
    assert "aten.empty.memory_format" not in names
    assert not [name for name in names if "scatter" in name]
    verify(module)
    from moec.reference.executor import Executor
    from moec.weights.context import WeightContext

    x = torch.randn(3, 4)
    (found,) = Executor(module, WeightContext()).run({"x": x}).values()
    assert torch.equal(found, Filled()(x))


def test_memory_that_is_read_before_it_is_written_is_refused() -> None:
    class Careless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.empty(x.shape[0], 6)
            y[:, :4] = x
            return y * 2

    with pytest.raises(UnsupportedModelError, match="not initialise"):
        _import(Careless(), torch.zeros(5, 4))
