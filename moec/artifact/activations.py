"""What rounding activations to int8 costs a model, as a line of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.artifact.ledger import LOSS_DIGITS, CheckOutcome, LayerError, LedgerEntry, round_error
from moec.artifact.loss import batch_loss
from moec.artifact.options import CompileOptions
from moec.artifact.runtime import OnnxModel
from moec.artifact.summary import model_size
from moec.artifact.verification import relative_difference, run_reference, verification_batch
from moec.codegen.onnx.emit import OnnxReport

if TYPE_CHECKING:
    from moec.module import Module

_PASS_TEXT = "emit{activations=int8}"


def uses_int8(report: OnnxReport) -> bool:
    """Whether some operator of the model rounds its activations to int8."""
    return report.int8_products > 0


def speed_hints(report: OnnxReport) -> tuple[str, ...]:
    """What makes products of packed weights faster, where they compute in float32."""
    if not report.float_products:
        return ()
    return (
        f"{report.float_products} products of packed weights compute in float32: --activations int8 is the fast form, "
        "at a difference that the ledger will state; without it, groups of 64 are faster than groups of 32",
    )


def activations_entry(path: Path | None, module: Module, options: CompileOptions) -> LedgerEntry:
    """The artifact `path` against its IR, whose activations are float32: outputs and loss. None: not measured."""
    size = model_size(module)
    errors: tuple[LayerError, ...] = ()
    change: float | None = None
    if path is not None:
        batch = verification_batch(module, text=options.text, seed=options.seed)
        expected = run_reference(module.op, module.weights, batch).output
        model = OnnxModel(path)
        kept = batch.mask.astype(bool)
        if model.is_decoder:
            found, _ = model.step(batch.ids, batch.mask, model.empty_cache(len(batch.ids)))
            change = round(batch_loss(found, batch) - batch_loss(expected, batch), LOSS_DIGITS)
        else:
            found = model.encode(batch.ids, batch.mask)
        difference = round_error(relative_difference(found, expected, kept))
        errors = (LayerError(layer="outputs", relative_error=difference),)
    return LedgerEntry(
        pass_text=_PASS_TEXT,
        claim="lossy",
        outcome=CheckOutcome.NOT_CHECKED if path is None else CheckOutcome.MEASURED,
        layer_errors=errors,
        before=size,
        after=size,
        seed=options.seed,
        loss_change=change,
    )
