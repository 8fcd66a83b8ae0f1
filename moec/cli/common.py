"""Options that several subcommands share, and how they print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moec.artifact.options import (
    Activations,
    Backend,
    Check,
    CheckpointDType,
    CheckpointOptions,
    OptimizeFor,
    OutputDType,
)
from moec.errors import UsageError

SourceArgument = Annotated[Path, typer.Argument(metavar="SOURCE", help="Hugging Face model folder.")]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `moec compile -o` wrote.")]
OthersOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--with", metavar="SOURCE", help="A further model of the same shape and tokens; repeat it for several."
    ),
]
PipelineOption = Annotated[str, typer.Option("--pipeline", help="Passes to run, as `a,b{option=value}`.")]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Passes by the name of a recipe, or from a YAML file; parameters as in 'best{experts=16 k=4}'.",
    ),
]
BudgetOption = Annotated[
    str, typer.Option("--budget", metavar="60%|4GiB", help="Make the experts, or all weights, fit this size.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Text, or token ids as .npy or .json, to calibrate on."),
]
TargetOption = Annotated[str, typer.Option("--target", help="Runtime to emit ONNX for: portable or ort-cpu.")]
DTypeOption = Annotated[OutputDType, typer.Option("--dtype", help="Element type of the artifact.")]
OptimizeForOption = Annotated[OptimizeFor, typer.Option("--optimize-for", help="What lowerings are chosen for.")]
ActivationsOption = Annotated[
    Activations, typer.Option("--activations", help="What packed weights are multiplied with on ort-cpu.")
]
CheckOption = Annotated[Check, typer.Option("--check", help="How much the ledger measures after each pass.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Makes random choices of passes repeatable.")]
WeightsInPlaceOption = Annotated[
    bool, typer.Option("--weights-in-place", help="Refer to the source's weights instead of writing them again.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder for tensors that passes compute; by default in the user's cache.")
]
PluginsOption = Annotated[
    list[str] | None,
    typer.Option("--load-pass-plugin", metavar="FILE.py|MODULE", help="Import this, so that its passes can be named."),
]
EmitOption = Annotated[
    str, typer.Option("--emit", metavar="onnx,huggingface,triton", help="What to write, separated by commas.")
]
ArchitecturesOption = Annotated[
    str,
    typer.Option("--architectures", metavar="sm90,gfx942", help="Triton: put binaries for these into the artifact."),
]
UniformOption = Annotated[
    bool,
    typer.Option(
        "--uniform", help="Hugging Face: also write what becomes larger so, such as experts of unequal width."
    ),
]
CheckpointDTypeOption = Annotated[
    CheckpointDType,
    typer.Option("--checkpoint-dtype", help="Hugging Face: element type; auto is the source's where that is exact."),
]
ShardSizeOption = Annotated[
    str, typer.Option("--shard-size", metavar="5GB", help="Hugging Face: the most that one weight file holds.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all cores by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def load_plugins(plugins: Sequence[str] | None) -> None:
    """Imports what `--load-pass-plugin` names. Raises PluginError."""
    from moec.pipeline.registry import load_plugin

    for plugin in plugins or ():
        load_plugin(plugin)


def parse_emit(text: str) -> tuple[Backend, ...]:
    """The backends of `--emit`, each once and always in one order. Raises UsageError for an unknown one."""
    found: set[Backend] = set()
    for name in text.split(","):
        try:
            found.add(Backend(name.strip()))
        except ValueError:
            known = ", ".join(backend.value for backend in Backend)
            raise UsageError(f"there is no backend {name.strip()!r}", hint=f"known are {known}") from None
    return tuple(backend for backend in Backend if backend in found)


def checkpoint_options(uniform: bool, dtype: CheckpointDType, shard_size: str) -> CheckpointOptions:
    """The options of a Hugging Face checkpoint. Raises UsageError for a size that is none."""
    from moec.budget.sizes import parse_budget

    try:
        size = parse_budget(shard_size).bytes
    except ValueError:
        size = None
    if not size:
        raise UsageError(f"--shard-size {shard_size} is no size", hint="write it as 5GB or 500MiB")
    return CheckpointOptions(uniform, dtype, size)


def table(rows: Sequence[tuple[str, ...]], numbers: frozenset[int] = frozenset()) -> str:
    """Rows as columns of equal width; the columns in `numbers` are aligned to the right. The first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
