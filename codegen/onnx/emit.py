"""From a module to the files of an ONNX model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

import moec
from moec.artifact.options import Activations, OptimizeFor
from moec.codegen.onnx import aten_matrix, aten_pointwise, aten_reduce, aten_shape, lower_moe, lower_nn, lower_quant
from moec.codegen.onnx.context import Context, EmitOptions, tensor_of
from moec.codegen.onnx.cost_model import Lowering
from moec.codegen.onnx.deploy_files import write_genai_config, write_lowering_report
from moec.codegen.onnx.expert_plan import plan_layers
from moec.codegen.onnx.external_data import Placement, StoredTensor, hard_link, lay_out, lay_out_experts, write_tensors
from moec.codegen.onnx.fallback_function import fallback_function
from moec.codegen.onnx.graph import ONNX_DTYPES, GraphBuilder
from moec.codegen.onnx.lower_moe import LayerLowering
from moec.codegen.onnx.packed.bands import with_products_of_bands
from moec.codegen.onnx.registry import emit_block
from moec.codegen.onnx.session_file import PREPACKED_FOLDER, SessionFacts, save_prepacked, write_session_file
from moec.codegen.onnx.targets import Target
from moec.dialects.aten import AtenOp
from moec.dialects.builtin import PAGE_ATTRIBUTE, PREPACKED_ATTRIBUTE, FuncOp, WeightOp
from moec.dialects.quant import DequantOp
from moec.ir.dimensions import DimExpr, symbol
from moec.ir.types import DType
from moec.module import Module

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
EXPERTS_FILE = "experts.onnx.data"

# imported for the emissions that they register
_EMISSION_MODULES = (aten_matrix, aten_pointwise, aten_reduce, aten_shape, lower_moe, lower_nn, lower_quant)

_EXPECTED_TOKENS = {OptimizeFor.DECODE: 1, OptimizeFor.PREFILL: 512}

_SIZE_NAMES: dict[DimExpr | int, str] = {
    symbol("batch"): "batch_size",
    symbol("seq"): "sequence_length",
    symbol("past"): "past_sequence_length",
    symbol("past") + symbol("seq"): "total_sequence_length",
}


@dataclass(frozen=True)
class EmittedFile:
    """A written file: its name in the folder, size in bytes, and SHA-256 where it was computed on the way."""

    name: str
    nbytes: int
    sha256: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """What was emitted.

    `node_count` is that of the main graph, `int8_products` the number of nodes that round their activations to int8,
    `float_products` that of nodes that could but do not, `session` how a file with externalised experts is loaded,
    `weight_bytes` the size of all weights without gaps between them; `without_genai` says why there is no
    genai_config.json, None if there is.
    """

    target: Target
    opset: int
    ir_version: int
    node_count: int
    weight_bytes: int
    files: tuple[EmittedFile, ...]
    layers: tuple[LayerLowering, ...]
    without_genai: str | None
    int8_products: int = 0
    float_products: int = 0
    session: SessionFacts | None = None


def emit_onnx(
    module: Module,
    folder: Path,
    *,
    target: Target = Target.PORTABLE,
    dtype: DType = DType.F32,
    weights_in_place: bool = False,
    optimize_for: OptimizeFor = OptimizeFor.DECODE,
    lowering: Lowering | None = None,
    activations: Activations = Activations.FLOAT32,
) -> OnnxReport:
    """Writes `model.onnx` and `model.onnx.data` into `folder`.

    `dtype` is how matrices are stored, float32 or float16; arithmetic is float32. `optimize_for` and the sizes of a
    layer decide how its experts are lowered, unless `lowering` names one form for all. `weights_in_place` stores no
    weight that lies in the checkpoint as it is needed, but links the checkpoint's files. `activations` are what packed
    weights are multiplied with where the target has an operator for them.

    Raises UnsupportedModelError for an operation without ONNX form or a weight that float16 cannot hold, ResourceError
    where the files cannot be written.
    """
    module = with_products_of_bands(module)
    profile = target.profile
    builder = GraphBuilder(profile.opset)
    tokens = _EXPECTED_TOKENS[optimize_for]
    page = module.op.attributes.get(PAGE_ATTRIBUTE, 0)
    assert isinstance(page, int)
    prepacked = PREPACKED_ATTRIBUTE in module.op.attributes
    options = EmitOptions(target, dtype, weights_in_place, tokens, lowering, activations, page, prepacked)
    context = Context(builder, module.weights, options)
    emit_function(context, module.main)
    folder.mkdir(parents=True, exist_ok=True)
    placements, data = _store(builder.stored, folder, page)
    model = _model(context, placements, folder)
    proto = ir.to_proto(model)
    # types of weights and constants, which say them themselves
    del proto.graph.value_info[:]
    payload = proto.SerializeToString(deterministic=True)
    (folder / MODEL_FILE).write_bytes(payload)
    linked = any(tensor.origin is not None for tensor in builder.stored)
    if not profile.contrib and not linked:
        # the checker refuses linked files, since it cannot know where else they are changed
        onnx.checker.check_model(str(folder / MODEL_FILE))
    files = (EmittedFile(MODEL_FILE, len(payload)), *data)
    session = _session_facts(context, module, folder)
    if session is not None:
        write_session_file(folder, session)
    without_genai = write_genai_config(module, folder, MODEL_FILE)
    write_lowering_report(folder, target, tuple(context.lowerings))
    return OnnxReport(
        target,
        profile.opset,
        profile.ir_version,
        len(builder.nodes),
        sum(tensor.nbytes for tensor in builder.stored),
        files,
        tuple(context.lowerings),
        without_genai,
        *_packed_products(proto),
        session,
    )


def _session_facts(context: Context, module: Module, folder: Path) -> SessionFacts | None:
    """How to load a file whose experts are to be read when they are chosen; None for any other file."""
    if not context.options.page_bytes:
        return None
    copies = any(layer.choice.lowering is not Lowering.FUSED for layer in context.lowerings)
    if not copies:
        return SessionFacts({})
    if context.options.prepacked:
        nbytes = save_prepacked(folder / MODEL_FILE)
        return SessionFacts({}, f"{PREPACKED_FOLDER}/{MODEL_FILE}", nbytes)
    packed = any(isinstance(op, DequantOp) for op in module.op.walk())
    # kernels of packed weights are slow by far on weights that they did not arrange; those of float32 are not
    return SessionFacts({} if packed else {"session.disable_prepacking": "1"})


def _packed_products(model: onnx.ModelProto) -> tuple[int, int]:
    """The numbers of nodes that multiply packed weights with activations in int8, and in float32, calls written out."""
    functions = {(function.domain, function.name): function for function in model.functions}
    counts: dict[tuple[str, str], Counter[bool]] = {}

    def counted(nodes: Iterable[onnx.NodeProto]) -> Counter[bool]:
        total: Counter[bool] = Counter()
        for node in nodes:
            called = node.domain, node.op_type
            if called in functions and called not in counts:
                counts[called] = counted(functions[called].node)
            total += counts.get(called, Counter())
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    total[attribute.i > 0] += 1
                total += counted(attribute.g.node)
        return total

    total = counted(model.graph.node)
    return total[True], total[False]


def emit_function(context: Context, function: FuncOp) -> None:
    """Emits a function as the main graph, with its argument and result names."""
    builder = context.builder
    context.gathered = _gathered(function)
    for argument, name in zip(function.arguments, function.arg_names, strict=True):
        kind = tensor_of(argument)
        context.values[argument] = builder.input(name, kind.dtype, [_size_name(size) for size in kind.shape])
    for argument in function.arguments:
        for axis, size in enumerate(tensor_of(argument).shape):
            if isinstance(size, DimExpr) and str(size) in size.symbols() and str(size) not in context.sizes:
                context.sizes[str(size)] = builder.size(context.values[argument], axis)
    plan_layers(context, function)
    results = emit_block(context, function.body)
    for value, result, name in zip(function.return_op.operands, results, function.result_names, strict=True):
        kind = tensor_of(value)
        builder.output(result, name, kind.dtype, [_size_name(size) for size in kind.shape])


def _gathered(function: FuncOp) -> frozenset[str]:
    """Expressions of the weights that an embedding reads."""
    found = set()
    for op in function.body:
        if isinstance(op, AtenOp) and op.name == "aten.embedding.default":
            weight = op.tensor("weight").defining_op
            if isinstance(weight, DequantOp):
                found |= {part.source for value in weight.operands if isinstance(part := value.defining_op, WeightOp)}
            if isinstance(weight, WeightOp):
                found.add(weight.source)
    return frozenset(found)


def _size_name(size: int | DimExpr) -> int | str:
    return size if isinstance(size, int) else _SIZE_NAMES.get(size, str(size))


def _store(
    tensors: tuple[StoredTensor, ...], folder: Path, page: int
) -> tuple[dict[str, Placement], tuple[EmittedFile, ...]]:
    """Writes the weights, or links the files that hold them already; returns where each lies.

    With `page`, experts get a file of their own, each on pages of so many bytes.
    """
    placed: dict[str, Placement] = {}
    links: dict[Path, str] = {}
    for tensor in tensors:
        if tensor.origin is not None:
            name = links.setdefault(tensor.origin.path, f"weights-{len(links):05d}.safetensors")
            placed[tensor.name] = Placement(name, tensor.origin.offset, tensor.origin.length)
    for source, name in links.items():
        hard_link(source, folder, name)
    rest = [tensor for tensor in tensors if tensor.name not in placed]
    files = [EmittedFile(name, (folder / name).stat().st_size) for name in links.values()]
    experts = [tensor for tensor in rest if page and tensor.expert is not None]
    experts.sort(key=lambda tensor: tensor.expert or ())
    others = [tensor for tensor in rest if not page or tensor.expert is None]
    for name, some, places in (
        (DATA_FILE, others, lay_out(others, DATA_FILE)),
        (EXPERTS_FILE, experts, lay_out_experts(experts, EXPERTS_FILE, page)),
    ):
        if some:
            digest = write_tensors(folder / name, some, places)
            placed.update(zip([tensor.name for tensor in some], places, strict=True))
            files.append(EmittedFile(name, (folder / name).stat().st_size, digest))
    return placed, tuple(files)


def _model(context: Context, placements: dict[str, Placement], folder: Path) -> ir.Model:
    builder = context.builder
    profile = context.options.target.profile
    for tensor, value in zip(builder.stored, builder.weight_values, strict=True):
        place = placements[tensor.name]
        value.const_value = ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            ONNX_DTYPES[tensor.dtype],
            shape=ir.Shape(tensor.shape),
            name=tensor.name,
            base_dir=folder,
        )
    functions = [context.functions[name] for name in sorted(context.functions)]
    inside = {domain for function in functions for domain in function.opset_imports}
    opsets = {domain: 1 if domain else profile.opset for domain in sorted({"", *builder.domains, *inside})}
    graph = ir.Graph(
        builder.inputs,
        builder.outputs,
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports=opsets,
        name="main",
    )
    functions += [fallback_function(profile.opset, form) for form in dict.fromkeys(context.fallbacks)]
    return ir.Model(
        graph,
        ir_version=profile.ir_version,
        producer_name="moec",
        producer_version=moec.__version__,
        functions=functions,
    )
