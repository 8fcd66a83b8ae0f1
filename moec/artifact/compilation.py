"""From a source folder to an artifact folder: load, run passes under the ledger, emit, verify, describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import moec
from moec.artifact.activations import activations_entry, speed_hints, uses_int8
from moec.artifact.checkpoint import compare_checkpoint, emit_checkpoint
from moec.artifact.emission import emit_folder
from moec.artifact.folder import atomic_folder
from moec.artifact.kernel_check import compare_kernels, compile_kernels, emit_kernels
from moec.artifact.ledger import LedgerEntry
from moec.artifact.manifest import (
    BuildRecord,
    FileRecord,
    Manifest,
    SourceRecord,
    VerificationRecord,
    describe_file,
    describe_files,
    write_manifest,
)
from moec.artifact.measurements import (
    MEASUREMENTS_NAME,
    Cost,
    Measurements,
    Stopwatch,
    VerificationRow,
    this_machine,
)
from moec.artifact.memory import MemoryWatch
from moec.artifact.model_card import Card, measure_card_loss, write_card
from moec.artifact.opened import CHECKPOINT_FOLDER, MODEL_FILE, MODULE_FILE, ONNX_FOLDER, TRITON_FOLDER
from moec.artifact.options import COPIED_FILES, Activations, Backend, CompileOptions, OutputDType
from moec.artifact.plan import plan_compilation
from moec.artifact.recorder import LedgerRecorder
from moec.artifact.report import LoweringFacts, Report, write_report
from moec.artifact.summary import active_parameters, layer_facts, model_size
from moec.artifact.verification import require_rows, tolerance_of, verification_batch, verify_model
from moec.codegen.onnx.emit import OnnxReport
from moec.codegen.onnx.targets import parse_target
from moec.codegen.triton.architectures import Architecture, parse_architectures
from moec.codegen.triton.running import require_triton
from moec.dialects.builtin import ModuleOp
from moec.errors import UsageError
from moec.frontend.huggingface import load_huggingface
from moec.frontend.model_kind import ModelKind, model_shape
from moec.ir import print_operation
from moec.module import Module
from moec.pipeline.base import Claim
from moec.pipeline.instruments import Instrument
from moec.pipeline.manager import PassManager, Pipeline, PipelineReport
from moec.record import write_record
from moec.weights.store import WeightStore

_VERSIONED = ("torch", "transformers", "safetensors", "onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True)
class CompileResult:
    """What a compilation made. `folder` is the artifact; `pipeline_report` has statistics, refusals and remarks.

    `hints` are what would make the artifact better, or faster at a price, in sentences.
    """

    folder: Path
    module: Module
    manifest: Manifest
    measurements: Measurements
    report: Report
    pipeline_report: PipelineReport
    hints: tuple[str, ...] = ()


def compile_folder(
    source: Path,
    output: Path,
    options: CompileOptions,
    *,
    replace: bool = False,
    observers: Sequence[Instrument] = (),
    reproducer: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> CompileResult:
    """Compiles the Hugging Face folder `source` into the artifact folder `output`, which appears when it is whole.

    `progress` is called with the name of each step. Raises every subclass of MoecError, each for its reason; the output
    folder does not exist then (or is the one that was there before).
    """
    # mistakes are reported before any work; the kind of the model decides between recipes only
    kind = model_shape(source).kind if options.recipe or options.budget else ModelKind.ANY
    requested = options.requested_pipeline(kind)
    Pipeline.parse(requested)
    if options.calibration is not None and not options.calibration.is_file():
        raise UsageError("there is no such file to calibrate on", where=str(options.calibration))
    parse_target(options.target)
    if not options.emit:
        raise UsageError("nothing would be emitted", hint="name a backend: onnx, huggingface, triton")
    if Backend.ONNX in options.emit and options.dtype is OutputDType.BFLOAT16:
        raise UsageError(
            "an ONNX artifact has no bfloat16", hint="take float32 or float16, or emit triton or huggingface alone"
        )
    architectures = _architectures(options)
    with atomic_folder(output, replace=replace) as folder, MemoryWatch() as memory:
        watch = Stopwatch(memory)

        def step(name: str) -> AbstractContextManager[None]:
            progress(name)
            return watch.step(name)

        with step("predict"):
            predicted = plan_compilation(source, options).cost
        with step("load"):
            module = load_huggingface(source, WeightStore(options.store), options.others)
            original = _copy(module)
            pipeline = Pipeline.parse(options.full_pipeline(kind, decoder=module.source.kind == "decoder"))
            before = model_size(module)
        with step("passes"):
            recorder = LedgerRecorder(module, options.check, seed=options.seed, text=options.text)
            manager = PassManager(pipeline, observers=(*observers, recorder), reproducer=reproducer)
            outcome = manager.run(
                module.op,
                weights=module.weights,
                module=module,
                seed=options.seed,
                calibration_file=options.calibration,
            )
        with step("write IR"):
            text = print_operation(module.op, locations=True)
            (folder / MODULE_FILE).write_text(f"{text}\n", encoding="utf-8")
        emitted: OnnxReport | None = None
        if Backend.ONNX in options.emit:
            with step("emit ONNX"):
                emitted = emit_folder(
                    module,
                    folder / ONNX_FOLDER,
                    target=options.target,
                    dtype=options.dtype,
                    optimize_for=options.optimize_for,
                    activations=options.activations,
                    weights_in_place=options.weights_in_place,
                )
        if Backend.HUGGINGFACE in options.emit:
            with step("emit Hugging Face"):
                written = emit_checkpoint(module, folder / CHECKPOINT_FOLDER, options.checkpoint, original=original)
            with step("write model card"):
                card = Card(
                    module,
                    options.recipe_title,
                    requested,
                    source_files(source),
                    (before.parameters, written.parameters),
                    written,
                    tuple(recorder.entries),
                    measure_card_loss(original, module, options.text),
                )
                write_card(folder / CHECKPOINT_FOLDER, card)
        if Backend.TRITON in options.emit:
            with step("emit Triton"):
                emit_kernels(module, folder / TRITON_FOLDER, options.dtype)
            if architectures:
                with step("compile kernels"):
                    compile_kernels(folder / TRITON_FOLDER, architectures)
        rows: list[VerificationRow] = []
        if options.verify:
            batch = verification_batch(module, text=options.text, seed=options.seed)
            with step("verify"):
                rows = verify_model(
                    folder / ONNX_FOLDER / MODEL_FILE if emitted is not None else None,
                    module,
                    original,
                    exact=is_exact(pipeline),
                    batch=batch,
                    dtype=options.dtype,
                    activations=options.activations,
                )
            if Backend.HUGGINGFACE in options.emit:
                with step("verify checkpoint"):
                    rows += compare_checkpoint(folder / CHECKPOINT_FOLDER, module, batch, options.checkpoint.dtype)
                    require_rows(rows)
            if Backend.TRITON in options.emit:
                with step("verify kernels"):
                    rows += compare_kernels(folder / TRITON_FOLDER, module, batch, options.dtype)
                    require_rows(rows)
        if emitted is not None and options.activations is Activations.INT8 and uses_int8(emitted):
            with step("measure activations"):
                path = folder / ONNX_FOLDER / MODEL_FILE if options.verify else None
                recorder.entries.append(activations_entry(path, module, options))
        with step("digest"):
            manifest = _manifest(source, module, options, pipeline, recorder.entries, rows, folder, emitted)
            write_manifest(folder, manifest)
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        actual = Cost(seconds=round(watch.seconds, 3), memory_bytes=memory.look(), disk_bytes=disk)
        measurements = Measurements(
            source=str(source.resolve()),
            others=tuple(str(other.resolve()) for other in options.others),
            calibration="" if options.calibration is None else str(options.calibration.resolve()),
            machine=this_machine(),
            steps=tuple(watch.steps),
            passes=tuple(recorder.times),
            predicted=predicted,
            actual=actual,
            verification=tuple(rows),
        )
        write_record(folder / MEASUREMENTS_NAME, measurements)
        checkpoint_bytes = sum(path.stat().st_size for path in (folder / CHECKPOINT_FOLDER).glob("*"))
        report = _report(source, module, emitted, manifest, measurements, before.bytes, checkpoint_bytes)
        write_report(folder, report)
    hints = outcome.warnings() + (() if emitted is None else speed_hints(emitted))
    return CompileResult(output, module, manifest, measurements, report, outcome, hints)


def _architectures(options: CompileOptions) -> tuple[Architecture, ...]:
    """Those that kernels are compiled for. Raises UsageError for unknown ones, and where there will be no kernels."""
    if not options.architectures:
        return ()
    found = parse_architectures(",".join(options.architectures))
    if Backend.TRITON not in options.emit:
        raise UsageError("architectures are named, and no kernels are emitted", hint="add --emit triton")
    require_triton("compiling kernels for architectures")
    return found


def _copy(module: Module) -> Module:
    """The module as it is now; passes change the original in place."""
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    return Module(clone, module.weights, module.source, others=module.others)


def _manifest(
    source: Path,
    module: Module,
    options: CompileOptions,
    pipeline: Pipeline,
    ledger: Sequence[LedgerEntry],
    rows: Sequence[VerificationRow],
    folder: Path,
    emitted: OnnxReport | None,
) -> Manifest:
    session = emitted.session if emitted is not None else None
    versioned = (*_VERSIONED, "triton") if options.architectures else _VERSIONED
    return Manifest(
        source=SourceRecord(
            model_type=module.source.model_type,
            architecture=module.source.class_name,
            parameters=model_size(module).parameters,
            files=source_files(source),
        ),
        others=tuple(source_files(other) for other in options.others),
        build=BuildRecord(
            pipeline=str(pipeline),
            emit=tuple(backend.value for backend in options.emit),
            target=options.target,
            dtype=options.dtype.value,
            optimize_for=options.optimize_for.value,
            check=options.check.value,
            seed=options.seed,
            weights_in_place=options.weights_in_place,
            activations=options.activations.value,
            session_options=session.options if session is not None else {},
            prepacked_bytes=session.prepacked_bytes if session is not None else 0,
            recipe=options.recipe_title,
            budget=options.budget,
            calibration=None if options.calibration is None else describe_file(options.calibration),
            architectures=tuple(item.name for item in _architectures(options)),
            **_checkpoint_record(options),
        ),
        versions={"moec": moec.__version__, **{name: version(name) for name in versioned}},
        ledger=tuple(ledger),
        verification=VerificationRecord(
            status="passed" if rows else "skipped",
            tokens=max((row.tokens for row in rows), default=0),
            tolerance=tolerance_of(options.activations).bound,
        ),
        files=describe_files(folder),
    )


def _checkpoint_record(options: CompileOptions) -> dict[str, Any]:
    if Backend.HUGGINGFACE not in options.emit:
        return {}
    wanted = options.checkpoint
    return {"uniform": wanted.uniform, "checkpoint_dtype": wanted.dtype.value, "shard_bytes": wanted.shard_bytes}


def is_exact(pipeline: Pipeline) -> bool:
    """Whether all passes claim to preserve the function, so that the result can be compared with the source."""
    return all(step.instance.promise() is Claim.EXACT for step in pipeline.passes)


def source_files(source: Path) -> dict[str, FileRecord]:
    """Size and digest of everything in the source folder that the artifact depends on."""
    names = sorted(path.name for path in source.glob("*.safetensors"))
    names += [name for name in ("model.safetensors.index.json", *COPIED_FILES) if (source / name).is_file()]
    return {name: describe_file(source / name) for name in names}


def _report(
    source: Path,
    module: Module,
    emitted: OnnxReport | None,
    manifest: Manifest,
    measurements: Measurements,
    source_bytes: int,
    checkpoint_bytes: int,
) -> Report:
    size = model_size(module)
    return Report(
        title=source.resolve().name,
        architecture=manifest.source.architecture,
        model_type=manifest.source.model_type,
        target=manifest.build.target,
        dtype=manifest.build.dtype,
        pipeline=manifest.build.pipeline,
        parameters=size.parameters,
        active_parameters=active_parameters(module),
        active_flops=size.active_flops,
        source_bytes=source_bytes,
        artifact_bytes=measurements.actual.disk_bytes,
        layers=layer_facts(module),
        lowerings=tuple(
            LoweringFacts(
                layer=layer.layer,
                lowering=layer.choice.lowering.value,
                reason=layer.choice.reason,
                nodes=layer.nodes,
                parity=layer.parity,
            )
            for layer in (emitted.layers if emitted is not None else ())
        ),
        nodes=emitted.node_count if emitted is not None else 0,
        without_genai=emitted.without_genai if emitted is not None else "no ONNX was emitted",
        checkpoint_bytes=checkpoint_bytes,
        ledger=manifest.ledger,
        verification=measurements.verification,
        losses=(),
        speeds=(),
        steps=measurements.steps,
        predicted=measurements.predicted,
        actual=measurements.actual,
        machine=measurements.machine,
        versions=manifest.versions,
    )
