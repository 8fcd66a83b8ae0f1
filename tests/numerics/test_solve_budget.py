"""Plans for a budget: what they promise, what they do, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import pytest
import torch
from safetensors.torch import load_file

from moec.api import run_passes
from moec.artifact.options import OutputDType
from moec.budget.actions import ActionKind, Offer
from moec.budget.coding import Coder, coded_inputs
from moec.budget.measure import Distortion, ErrorMeasure
from moec.budget.offers import TableSettings, stored_bytes, work
from moec.budget.plan import BudgetPlan, read_plan, write_plan
from moec.budget.tables import LayerTable, layer_table, priced_offers
from moec.codegen.onnx.emit import emit_onnx
from moec.codegen.onnx.targets import parse_target
from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.spec import Element
from moec.dialects.builtin import WeightOp
from moec.errors import MoecError, UnsafeInputError, UsageError
from moec.experts import FeedForward, MoeLayer, Quantized, find_moe_layers, load_expert, run_layer
from moec.ir import DType, TensorType
from moec.module import Module
from moec.passes.quantizing.blocks import Part
from moec.passes.quantizing.second_order import SecondOrder
from moec.quantization.packed import Packed
from tests.frontend.tiny_models import tiny_model
from tests.numerics.calibrated_models import raised, random_sequences, write_tokens

EVERY_ACTION = frozenset(set(ActionKind) - {ActionKind.KEEP})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of one ancestor. In layer 0 expert 1 is a copy of expert 0, and expert 2 gives nothing but zeros."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model("mixtral", num_hidden_layers=2)
    with torch.no_grad():
        for name, stack in model.named_parameters():
            if stack.ndim == 3:
                stack.copy_(stack[:1] + 0.3 * (stack - stack[:1]))
                if "layers.0." in name:
                    stack[1] = stack[0]
                    if name.endswith("down_proj"):
                        stack[2] = 0
    model.save_pretrained(str(path))
    write_tokens(path / "tokens.json", random_sequences([24] * 12))
    return path


def calibrated(folder: Path, store: Path, *, gradients: bool = True) -> Module:
    module = raised(folder, store)
    run_passes(module, f"calibrate{{tokens={folder / 'tokens.json'} gradients={str(gradients).lower()}}}")
    return module


def solved(module: Module, options: str) -> BudgetPlan:
    run_passes(module, f"solve-budget{{{options}}}")
    assert module.plan is not None
    return module.plan


def expert_bytes(module: Module) -> int:
    """Bytes of all weights that experts read, each content once."""
    sizes = {}
    for layer in find_moe_layers(module.op):
        for value in layer.experts.weights:
            assert isinstance(value.defining_op, WeightOp) and isinstance(value.type, TensorType)
            sizes[value.defining_op.source] = value.type.dtype.bytes * value.type.element_count
    return sum(sizes.values())


def settings_for(bits: tuple[int, ...], distortion: Distortion = Distortion.MSE) -> TableSettings:
    return TableSettings(EVERY_ACTION, 8, (0.25, 0.5), 8, distortion, OutputDType.FLOAT32, bits=bits)


def tables(module: Module, distortion: Distortion = Distortion.MSE, bits: tuple[int, ...] = ()) -> list[LayerTable]:
    assert module.calibration is not None
    settings = settings_for(bits, distortion)
    return [layer_table(layer, module.calibration, settings) for layer in find_moe_layers(module.op)]


def codes_made(module: Module, layer: int, expert: int, settings: TableSettings, offers: list[Offer]) -> list[Offer]:
    """Offers of codes at the prices of codes that are made."""
    assert module.calibration is not None
    return priced_offers(find_moe_layers(module.op)[layer], module.calibration, settings, {expert: offers})[expert]


def coder_of(module: Module, layer: MoeLayer, expert: int, group: int, *, refit: bool) -> Coder:
    assert module.calibration is not None
    sample = module.calibration.sample(layer)
    source = load_expert(layer, sample.weights, expert)
    assert isinstance(source, FeedForward)
    return Coder.of(source, coded_inputs(layer, sample), expert, group, refit=refit)


@pytest.mark.parametrize("kind", sorted(EVERY_ACTION, key=lambda kind: kind.value))
def test_one_action_costs_what_its_table_says(kind: ActionKind, folder: Path, tmp_path: Path) -> None:
    """The squared error of the layer's output, and the bytes, of a plan that changes one expert."""
    module = calibrated(folder, tmp_path)
    assert module.calibration is not None
    plan = solved(module, "bytes=100%")
    layer = find_moe_layers(module.op)[1]
    bits = (4, 3) if kind is ActionKind.QUANTIZE else ()
    table = tables(module, bits=bits)[1].experts[4]
    offer = next(offer for offer in table.offers if offer.action.kind is kind)
    if bits:
        (offer,) = codes_made(module, 1, 4, settings_for(bits), [offer])
    row = (
        plan.layers[1]
        .experts[4]
        .model_copy(
            update={
                "action": kind,
                "size": offer.action.size,
                "bits": offer.action.bits,
                "down_bits": offer.action.down_bits,
                "neurons": offer.neurons,
                "bytes": offer.bytes,
            }
        )
    )
    experts = (*plan.layers[1].experts[:4], row, *plan.layers[1].experts[5:])
    changed = plan.layers[1].model_copy(update={"experts": experts})
    module.plan = plan.model_copy(update={"layers": (plan.layers[0], changed)})
    sample, before = module.calibration.sample(layer), expert_bytes(module)
    run_passes(module, "apply-plan")
    run = run_layer(find_moe_layers(module.op)[1], module.weights, sample.x, sample.router_input)
    assert run.y is not None
    error = float((run.y - sample.y).double().square().sum()) / len(sample)
    assert offer.distortion > 0
    assert error == pytest.approx(offer.distortion, rel=1e-3)
    base = tables(calibrated(folder, tmp_path))[1].base_bytes if kind is ActionKind.DELTA else 0
    assert before - expert_bytes(module) == table.offers[0].bytes - offer.bytes - base


def test_codes_of_the_last_matrix_may_have_the_next_number_of_bits(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    assert module.calibration is not None
    coded = frozenset({ActionKind.QUANTIZE})
    settings = TableSettings(coded, 1, (), 0, Distortion.MSE, OutputDType.FLOAT32, refit=True, bits=(4, 2), group=16)
    layer = find_moe_layers(module.op)[1]
    for table in layer_table(layer, module.calibration, settings).experts:
        made = codes_made(module, 1, table.expert, settings, list(table.offers[1:]))
        offers = {(offer.action.bits, offer.action.down_bits): offer for offer in made}
        assert sorted(offers) == [(2, 2), (2, 4), (4, 4)]
        falling = [offers[key].distortion for key in sorted(offers)]
        assert falling == sorted(falling, reverse=True) and falling[-1] > 0
        assert [offers[key].bytes for key in sorted(offers)] == sorted(offers[key].bytes for key in offers)


@pytest.mark.parametrize("refit", [False, True])
def test_estimates_tell_what_codes_will_cost(refit: bool, folder: Path, tmp_path: Path) -> None:
    """Within a factor of four, where prices span hundreds; bytes exactly."""
    module = calibrated(folder, tmp_path)
    assert module.calibration is not None
    actions = frozenset({ActionKind.NARROW, ActionKind.QUANTIZE})
    settings = TableSettings(
        actions, 4, (), 0, Distortion.CURVATURE, OutputDType.FLOAT32, refit=refit, bits=(8, 4, 2), group=16
    )
    layer = find_moe_layers(module.op)[1]
    table = layer_table(layer, module.calibration, settings).experts[4]
    estimated = [offer for offer in table.offers if offer.sure is not None]
    assert len(estimated) == 4 * 5
    made = codes_made(module, 1, 4, settings, estimated)
    prices = [offer.distortion for offer in made]
    assert max(prices) > 300 * min(prices)
    for real, guess in zip(prices, estimated, strict=True):
        assert guess.distortion / 4 < real < 4 * guess.distortion
    coder = coder_of(module, layer, 4, settings.group, refit=refit)
    for offer in estimated:
        packed = coder.coded(offer.neurons, offer.action.bits, offer.action.down_bits)
        assert offer.bytes == stored_bytes(packed, settings.dtype)


def test_codes_are_made_for_few_of_many_offers_and_all_that_are_chosen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = SecondOrder.__call__

    def counted(rounding: SecondOrder, part: Part) -> Packed:
        made.append(part.where)
        return original(rounding, part)

    monkeypatch.setattr(SecondOrder, "__call__", counted)
    module = calibrated(folder, tmp_path)
    plan = solved(module, "bytes=20% bits=8,6,5,4,3,2 refit group=16 actions=narrow,zero")
    assert module.calibration is not None
    layers = find_moe_layers(module.op)
    rows = [(layer, row) for layer, item in zip(layers, plan.layers, strict=True) for row in item.experts]
    # each of them has 88 offers of codes; one coding of all numbers of bits would be 18 matrices
    assert len(made) < 15 * len(rows)
    assert plan.predicted == pytest.approx(sum(row.distortion for _, row in rows))
    packed = [(layer, row) for layer, row in rows if row.bits]
    assert packed
    for layer, row in packed:
        sample = module.calibration.sample(layer)
        expert = load_expert(layer, sample.weights, row.expert)
        assert isinstance(expert, FeedForward)
        chosen, gates = sample.chosen(layer, row.expert)
        coder = coder_of(module, layer, row.expert, plan.group, refit=True)
        inputs = sample.x[chosen].float()
        errors = coder.coded(row.neurons, row.bits, row.down_bits).apply(inputs) - expert.apply(inputs)
        measure = ErrorMeasure.of(Distortion.CURVATURE, layer, sample, module.calibration.statistics(layer))
        real = measure.of_expert(chosen).price(chosen, errors * gates[:, None])
        assert row.distortion == pytest.approx(real, rel=1e-6)


@pytest.mark.parametrize(
    "distortion", [Distortion.MSE, Distortion.SENSITIVITY, Distortion.CURVATURE, Distortion.FISHER]
)
def test_measures_agree_on_what_costs_nothing(distortion: Distortion, folder: Path, tmp_path: Path) -> None:
    first = tables(calibrated(folder, tmp_path), distortion)[0].experts
    for expert, other in ((0, 1), (1, 0)):
        offers = {(offer.action.kind, offer.action.size): offer.distortion for offer in first[expert].offers}
        typical = offers[ActionKind.ZERO, 0]
        assert offers[ActionKind.REDIRECT, other] == 0
        assert offers[ActionKind.REDIRECT, 5] > 0.01 * typical
        widths = [offers[ActionKind.NARROW, 12 * step] for step in range(1, 8)]
        assert 0 < widths[-1] < widths[0] < 1.5 * typical
    silent = {offer.action.kind: offer.distortion for offer in first[2].offers}
    assert silent[ActionKind.ZERO] == silent[ActionKind.CONSTANT] == 0


@pytest.mark.parametrize(("share", "target"), [(0.8, "portable"), (0.4, "portable"), (0.2, "ort-cpu")])
def test_the_plan_keeps_to_its_bytes_and_the_artifact_has_them(
    share: float, target: str, folder: Path, tmp_path: Path
) -> None:
    """V12."""
    module = calibrated(folder, tmp_path / "store")
    sizes = [_initializer_bytes(module, tmp_path / "before", target)]
    source = expert_bytes(module)
    plan = solved(module, f"bytes={share:.0%}")
    run_passes(module, "apply-plan,canonicalize,dce")
    sizes.append(_initializer_bytes(module, tmp_path / "after", target))
    assert plan.source_bytes == source
    assert plan.bytes == expert_bytes(module) <= plan.budget_bytes == int(share * source)
    assert plan.bytes > 0.97 * plan.budget_bytes
    # tables of which output leads to which expert, and of sizes, are not weights
    assert sizes[0] - sizes[1] == source - plan.bytes


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts with biases, which are vectors as constants are."""
    path = tmp_path_factory.mktemp("biased")
    tiny_model("gpt_oss", num_hidden_layers=2, intermediate_size=128).save_pretrained(str(path))
    write_tokens(path / "tokens.json", random_sequences([24] * 12))
    return path


def test_an_artifact_in_float16_has_the_bytes_of_the_account(biased: Path, tmp_path: Path) -> None:
    module = calibrated(biased, tmp_path / "store", gradients=False)
    targets = ("portable", "ort-cpu")
    before = [_initializer_bytes(module, tmp_path / f"before-{name}", name, DType.F16) for name in targets]
    plan = solved(module, "bytes=40% actions=narrow,constant,redirect steps=8 dtype=float16")
    assert {ActionKind.NARROW, ActionKind.CONSTANT} <= set(plan.counts())
    run_passes(module, "apply-plan,canonicalize,dce")
    after = [_initializer_bytes(module, tmp_path / f"after-{name}", name, DType.F16) for name in targets]
    assert [old - new for old, new in zip(before, after, strict=True)] == [plan.source_bytes - plan.bytes] * 2


@pytest.mark.slow
def test_kernels_in_bfloat16_have_the_bytes_of_the_account(folder: Path, tmp_path: Path) -> None:
    """Widths in whole tiles of 16, which others are filled up to; one row of zeros is the bias of who has none."""
    module = calibrated(folder, tmp_path / "store", gradients=False)
    before = _kernel_bytes(module, tmp_path / "before")
    plan = solved(module, "bytes=40% actions=narrow,constant steps=6 dtype=bfloat16")
    constants = [sum(row.action is ActionKind.CONSTANT for row in layer.experts) for layer in plan.layers]
    assert sum(constants)
    run_passes(module, "apply-plan,canonicalize,dce")
    zeros = 0
    for layer, count in zip(plan.layers, constants, strict=True):
        widest = max(row.size or 96 for row in layer.experts if row.action.is_stored)
        zeros += 4 * (2 * widest + 64) * bool(count)
    assert before == plan.source_bytes
    assert _kernel_bytes(module, tmp_path / "after") == plan.bytes + zeros


def _kernel_bytes(module: Module, folder: Path) -> int:
    """Bytes of the experts in a package of kernels: without tables and routers."""
    emit_triton(module, folder, element=Element.BFLOAT16)
    tensors = [item for path in sorted(folder.rglob("*.safetensors")) for item in load_file(path).items()]
    return sum(tensor.nbytes for name, tensor in tensors if name.startswith(("input", "output", "biases")))


@pytest.mark.slow
@pytest.mark.parametrize("refit", ["false", "true"])
def test_bits_compete_with_the_other_ways(refit: str, folder: Path, tmp_path: Path) -> None:
    """Half-wide experts in codes and whole ones are in one plan, and do what it says and take what it says."""
    module = calibrated(folder, tmp_path / "store")
    sizes = [_initializer_bytes(module, tmp_path / "before", "portable")]
    source = expert_bytes(module)
    plan = solved(module, f"bytes=12% bits=8,4,3,2 refit={refit} file={tmp_path / 'plan.json'}")
    without = solved(module, f"bytes=12% refit={refit}")
    assert plan.predicted < 0.5 * without.predicted
    coded = [row for layer in plan.layers for row in layer.experts if row.bits]
    assert len({row.bits for row in coded}) > 1
    assert {ActionKind.QUANTIZE} <= {row.action for row in coded} <= {ActionKind.QUANTIZE, ActionKind.NARROW}
    run_passes(module, f"apply-plan{{file={tmp_path / 'plan.json'}}},canonicalize,dce")
    assert plan.bytes == expert_bytes(module) <= plan.budget_bytes
    sizes.append(_initializer_bytes(module, tmp_path / "after", "portable"))
    # graphs that decode have some small tables of shifts
    assert 0 <= (source - plan.bytes) - (sizes[0] - sizes[1]) <= 64
    width = int(module.config["intermediate_size"])
    for layer, tabled in zip(find_moe_layers(module.op), plan.layers, strict=True):
        experts = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
        packed = [item for item in experts if isinstance(item, FeedForward) and isinstance(item.down.matrix, Quantized)]
        wanted = [len(row.neurons) or width for row in tabled.experts if row.bits]
        assert sorted(item.width for item in packed) == sorted(wanted)


def _initializer_bytes(module: Module, folder: Path, target: str, dtype: DType = DType.F32) -> int:
    """Bytes of all tensors of numbers and codes of the exported model but single numbers."""
    folder.mkdir()
    emit_onnx(module, folder, target=parse_target(target), dtype=dtype)
    model = onnx_ir.load(folder / "model.onnx")
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    tensors = [item.const_value for graph in graphs for item in graph.initializers.values()]
    kinds = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.UINT8)
    return sum(item.nbytes for item in tensors if item is not None and item.dtype in kinds and item.size > 1)


def test_everything_kept_is_bit_identical(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    before = module.print()
    plan = solved(module, "bytes=100%")
    run_passes(module, "apply-plan")
    assert set(plan.counts()) == {ActionKind.KEEP}
    assert plan.predicted == plan.gap == 0
    assert module.print() == before


def test_copies_and_silent_experts_go_first_and_for_nothing(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    plan = solved(module, "bytes=87.5%")
    actions = [row.action for row in plan.layers[0].experts]
    assert ActionKind.REDIRECT in actions[:2]
    assert actions[2] in (ActionKind.ZERO, ActionKind.REDIRECT)
    assert plan.predicted == 0
    assert module.calibration is not None
    sample = module.calibration.sample(find_moe_layers(module.op)[0])
    run_passes(module, "apply-plan")
    run = run_layer(find_moe_layers(module.op)[0], module.weights, sample.x, sample.router_input)
    assert run.y is not None
    assert float((run.y - sample.y).abs().max()) <= 1e-5 * float(sample.y.abs().max())


def test_protected_experts_stay_and_serve_nobody(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    for layer in find_moe_layers(module.op):
        layer.experts.protected = (0, 5)
    kept = [_matrices(module, index, expert) for index in (0, 1) for expert in (0, 5)]
    plan = solved(module, "bytes=40%")
    run_passes(module, "apply-plan")
    for layer in plan.layers:
        assert [layer.experts[expert].action for expert in (0, 5)] == [ActionKind.KEEP] * 2
        assert all(row.size not in (0, 5) for row in layer.experts if row.action is ActionKind.REDIRECT)
    found = []
    for index, layer in enumerate(find_moe_layers(module.op)):
        found += [_matrices(module, index, expert) for expert in sorted(layer.protected)]
    assert len(found) == len(kept)
    for before, after in zip(kept, found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    with pytest.raises(UsageError, match=r"below the minimum.*25\.0%"):
        solved(module_with_protection(folder, tmp_path), "bytes=20%")


def module_with_protection(folder: Path, store: Path) -> Module:
    module = calibrated(folder, store)
    for layer in find_moe_layers(module.op):
        layer.experts.protected = (0, 5)
    return module


def _matrices(module: Module, index: int, expert: int) -> list[torch.Tensor]:
    found = load_expert(find_moe_layers(module.op)[index], module.weights, expert)
    assert isinstance(found, FeedForward) and found.gate is not None
    return [found.gate.dense(), found.up.dense(), found.down.dense()]


def test_a_budget_below_the_minimum_says_what_the_minimum_is(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    with pytest.raises(UsageError, match=r"below the minimum.*\(12\.5%\)") as caught:
        solved(module, "bytes=5% actions=narrow steps=8")
    assert "give at least 12.5%" in caught.value.hint
    plan = solved(module, "bytes=12.5% actions=narrow steps=8")
    assert {(row.action, row.size) for layer in plan.layers for row in layer.experts} == {(ActionKind.NARROW, 12)}
    with pytest.raises(UsageError, match="below the minimum"):
        solved(module, "bytes=1000")


def test_every_layer_keeps_as_many_experts_as_a_token_chooses(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    plan = solved(module, "bytes=2%")
    assert plan.bytes <= plan.budget_bytes
    for layer in plan.layers:
        assert sum(row.action.is_stored for row in layer.experts) >= 2
    run_passes(module, "apply-plan")


def test_bytes_of_the_whole_model(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    whole = sum(tensor.numel() * 4 for tensor in _weights(module))
    plan = solved(module, f"bytes={whole - plan_bytes(module) // 2}")
    assert plan.budget_bytes == plan.source_bytes - plan_bytes(module) // 2


def plan_bytes(module: Module) -> int:
    return expert_bytes(module)


def _weights(module: Module) -> list[torch.Tensor]:
    sources = {op.source for op in module.op.walk() if isinstance(op, WeightOp) and op.value.uses}
    return [module.weights.load(source) for source in sorted(sources)]


def test_a_budget_of_flops_binds(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    free = solved(module, "bytes=70%")
    bound = solved(module, "bytes=70% flops=50%")
    assert free.flops > 0.5 * free.source_flops >= bound.flops
    assert bound.predicted > free.predicted


def test_flops_of_a_plan_are_those_of_its_experts(folder: Path, tmp_path: Path) -> None:
    """V12: by the tokens that choose each."""
    module = calibrated(folder, tmp_path)
    assert module.calibration is not None
    statistics = [module.calibration.statistics(layer) for layer in find_moe_layers(module.op)]
    plan = solved(module, "bytes=40% actions=narrow,constant,delta")
    assert len(plan.counts()) > 1
    run_passes(module, "apply-plan")
    counted = 0.0
    for layer, found in zip(find_moe_layers(module.op), statistics, strict=True):
        for number in range(layer.expert_count):
            counted += float(found.count[number]) / found.tokens * work(load_expert(layer, module.weights, number))
    assert plan.flops == pytest.approx(counted)


def test_a_plan_from_a_file_does_the_same(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path)
    file = tmp_path / "plan.json"
    plan = solved(module, f"bytes=30% file={file}")
    assert read_plan(file) == plan
    run_passes(module, "apply-plan")
    again = calibrated(folder, tmp_path)
    run_passes(again, f"apply-plan{{file={file}}}")
    assert again.print() == module.print()
    with pytest.raises(MoecError, match="solve the budget again"):
        run_passes(again, f"apply-plan{{file={file}}}")
    write_plan(file, plan.model_copy(update={"layers": (plan.layers[0].model_copy(update={"layer": "other"}),)}))
    with pytest.raises(UsageError, match="a layer other that the model does not have"):
        run_passes(calibrated(folder, tmp_path), f"apply-plan{{file={file}}}")
    file.write_text('{"schema": "moec.plan/1"}')
    with pytest.raises(UnsafeInputError, match="malformed"):
        run_passes(again, f"apply-plan{{file={file}}}")
    with pytest.raises(UsageError, match="no such plan"):
        run_passes(again, f"apply-plan{{file={tmp_path / 'none.json'}}}")


def test_without_gradients_errors_are_squares_and_sensitivity_is_refused(folder: Path, tmp_path: Path) -> None:
    module = calibrated(folder, tmp_path, gradients=False)
    assert solved(module, "bytes=60%").measure == "mse"
    with pytest.raises(UsageError, match="needs gradients"):
        solved(module, "bytes=60% distortion=fisher")
