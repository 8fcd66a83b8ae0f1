"""The operators and modules of a package, by torch on a CPU or by kernels: export, gradients, a place in a model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from moec.codegen.triton.emit import emit_triton
from moec.codegen.triton.rendering import PACKAGE_NAME
from moec.codegen.triton.running import import_package
from moec.codegen.triton.spec import Element
from moec.dialects.moe import Normalize, Routing
from moec.dialects.quant import Integer, Span
from moec.quantization.rounding import Target
from moec.reference.executor import Executor
from tests.codegen.triton_layers import DEVICES, HIDDEN, Case, build, rows_of
from tests.experts.models import raised_model
from tests.ir.expert_bodies import affine, constant, dense, latent, low_rank

CASES = [
    Case("plain", routing=Routing(k=2, normalize=Normalize.SUM)),
    Case(
        "packed, with biases and one expert left as it is",
        [(dense(HIDDEN, 32, bias=True), (0, 1, 2))],
        (0, 2, 1, -1),
        packed={0: Target(Integer(4, Span.GROUP, 32)), 2: Target(Integer(8))},
    ),
    Case(
        "latent, factored and constant experts beside a shared one",
        [
            (latent(HIDDEN, 16, 8), (0,)),
            (low_rank(HIDDEN, 24, 3, base=True), (1,)),
            (constant(HIDDEN), (2,)),
            (affine(HIDDEN, 4), (3,)),
        ],
        shared=[(dense(HIDDEN, 24), True)],
    ),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("operators")
    emit_triton(build(CASES, store=folder / "store"), folder, element=Element.FLOAT32)
    return import_package(folder / PACKAGE_NAME)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name = request.param
    assert isinstance(name, str)
    return name


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_the_reference(number: int, package: ModuleType, device: str, tmp_path: Path) -> None:
    module = build(CASES, store=tmp_path)
    rows = rows_of(11)
    with torch.no_grad():
        expected = Executor(module.op, module.weights).run({"x": rows})[f"y{number}"]
    found = package.load_layer(number, device)(rows.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)


# the last case has all kinds of tensors; a check takes seconds
@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_operators_keep_the_rules_of_torch(number: int, package: ModuleType, device: str) -> None:
    block = package.load_layer(number, device)
    operators = package.blocks.OPERATORS[block.kind]
    kernels = package.blocks.KERNELS[block.kind]
    logits = torch.randn(5, len(CASES[number].stored), device=device, requires_grad=True)
    operands = [getattr(block, name) for name in kernels.ROUTE_OPERANDS]
    torch.library.opcheck(operators[0], (logits, operands))
    gates, ids = operators[0](logits.detach(), operands)
    weights = [getattr(block, name) for name in package.blocks.weight_names(kernels)]
    torch.library.opcheck(operators[1], (rows_of(5).to(device).requires_grad_(), ids, gates.requires_grad_(), weights))


class _Layer(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block(rows)
        return result


def test_exports_with_any_number_of_tokens(package: ModuleType, device: str) -> None:
    layer = _Layer(package.load_layer(0, device))
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    exported = torch.export.export(layer, (rows_of(7).to(device),), dynamic_shapes={"rows": {0: tokens}})
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("experts_0" in name for name in names) == sum("route_0" in name for name in names) == 1
    for count in (1, 13):
        rows = rows_of(count).to(device)
        torch.testing.assert_close(exported.module()(rows), layer(rows))


def test_gradients_reach_the_router_and_the_rows(package: ModuleType, device: str) -> None:
    """Against numbers: the operators' own rule for gradients is not used for them."""
    block = package.load_layer(0, device)
    block.router.requires_grad_()
    rows = rows_of(6).to(device).requires_grad_()
    direction = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(3)).to(device)
    (block(rows) * direction).sum().backward()
    step = 1e-2
    for tensor, gradient in ((block.router, block.router.grad), (rows, rows.grad)):
        assert gradient is not None and gradient.abs().max() > 0
        along = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)).to(device)
        along /= along.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * along
                values.append(float((block(rows) * direction).sum()))
                tensor -= sign * step * along
        slope = float((gradient * along).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_its_gradients(backend: str, package: ModuleType, device: str) -> None:
    layer = _Layer(package.load_layer(2, device))
    layer.block.router.requires_grad_()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for count in (3, 7):
        found = {}
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(rows_of(count).to(device))
            y.square().sum().backward()
            assert layer.block.router.grad is not None
            found[run] = (y.detach(), layer.block.router.grad.clone())
        for one, other in zip(found[layer], found[compiled], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_blocks_take_their_place_in_a_model(model_type: str, device: str, tmp_path: Path) -> None:
    """Shared experts, with a gate in qwen2_moe and without in deepseek_v3, are computed by the same kernels."""
    module = raised_model(model_type, tmp_path)
    emit_triton(module, tmp_path / "kernels", element=Element.FLOAT32)
    package = import_package(tmp_path / "kernels" / PACKAGE_NAME)
    model = transformers.AutoModelForCausalLM.from_pretrained(module.source.folder, dtype=torch.float32)
    model = model.eval().to(device)
    ids = torch.arange(3, 15, device=device)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert package.replace_blocks(model) == len(package.layer_names()) > 0
        after = model(ids).logits
    assert sum(isinstance(part, package.MoeBlock) for part in model.modules()) == len(package.layer_names())
    assert not any("shared_expert" in name for name, _ in model.named_modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
