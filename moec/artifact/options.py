"""The options of a compilation, as the command line and `moec.compile` share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from moec.cache import cache_folder
from moec.errors import UsageError
from moec.frontend.model_kind import ModelKind
from moec.weights.output_type import OutputDType as OutputDType

RAISING_PIPELINE = "canonicalize,cse,dce,expand-complex,raise-nn,raise-moe,canonicalize,cse,dce"
"""Runs before the passes that a user names: they find norms, attention, routers and experts as single operations."""

DECODER_PIPELINE = "add-kv-cache"
"""Runs after them on decoders: generation needs the cache."""

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
"""What is copied from the source folder beside the exported model."""

LEAN_BYTES = 128 << 20
"""An exported model larger than this is verified from its mapped file, without copies of its weights."""


def default_store() -> Path:
    """Where the tensors that passes compute are kept."""
    return cache_folder() / "store"


class Check(Enum):
    """How much of the model the ledger compares before and after each pass."""

    NONE = "none"  # nothing
    CHANGED = "changed"  # what a pass changed: the function on real tokens, and each expert that it touched
    FULL = "full"  # the same after every pass, and on more tokens


class Backend(Enum):
    """What an artifact can hold."""

    ONNX = "onnx"
    HUGGINGFACE = "huggingface"
    TRITON = "triton"


class CheckpointDType(Enum):
    """The element type of a written checkpoint."""

    AUTO = "auto"  # the source's for every tensor that it holds exactly, float32 for the others
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


SHARD_BYTES = 5_000_000_000
"""What one weight file of a written checkpoint holds at most."""


@dataclass(frozen=True)
class CheckpointOptions:
    """How a Hugging Face checkpoint is written.

    `uniform`: also what transformers can only hold in a larger form, such as experts of unequal width.
    `shard_bytes`: the most that one weight file holds.
    """

    uniform: bool = False
    dtype: CheckpointDType = CheckpointDType.AUTO
    shard_bytes: int = SHARD_BYTES


class OptimizeFor(Enum):
    """What the cost model of the backend weighs when it chooses between lowerings."""

    DECODE = "decode"
    PREFILL = "prefill"


class Activations(Enum):
    """The numbers that packed weights are multiplied with, where the target has operators for them."""

    FLOAT32 = "float32"
    INT8 = "int8"  # rounded, with a scale for each block of a row: faster, and the ledger says what it costs


@dataclass(frozen=True)
class CompileOptions:
    """Everything that decides the bytes of an artifact besides its source.

    `pipeline` is pipeline text; its passes run between RAISING_PIPELINE and, for decoders, DECODER_PIPELINE. Instead of
    it there may be a recipe, by name or file and with parameters (`best{k=2}`), or a budget for the recipe or, without
    one, for the recipe `best`.
    """

    pipeline: str = ""
    target: str = "portable"
    dtype: OutputDType = OutputDType.FLOAT32
    optimize_for: OptimizeFor = OptimizeFor.DECODE
    activations: Activations = Activations.FLOAT32
    check: Check = Check.CHANGED
    seed: int = 0
    weights_in_place: bool = False
    verify: bool = True
    store: Path = field(default_factory=default_store)
    """Folder for the tensors that passes compute; the IR refers to them by their digests."""

    text: Path | None = None
    """Text for the checks and for the verification; None takes a passage that moec brings along."""

    recipe: str = ""
    budget: str = ""
    calibration: Path | None = None
    """Text or token ids for passes that calibrate; None takes texts that moec brings along."""

    others: tuple[Path, ...] = ()
    """Folders of further models of the same shape and tokens, for passes that join several."""

    emit: tuple[Backend, ...] = (Backend.ONNX,)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """How the Hugging Face checkpoint is written, where there is one."""

    architectures: tuple[str, ...] = ()
    """GPU architectures whose binaries of the Triton kernels go into the artifact, such as sm90."""

    def requested_pipeline(self, model: ModelKind) -> str:
        """The text of the passes that the user asked for, on a model of a kind.

        Raises UsageError for contradictions, unknown recipes, and recipes for other models.
        """
        if not self.recipe and not self.budget:
            return self.pipeline
        if self.pipeline:
            raise UsageError("a pipeline excludes a recipe and a budget", hint="put solve-budget into the pipeline")
        from moec.pipeline.recipes import requested_pipeline

        return requested_pipeline(self.recipe, self.budget, self.dtype.value, model)

    @property
    def recipe_title(self) -> str:
        """The recipe with its parameters, without the folder of a file."""
        from moec.pipeline.recipes import RecipeRequest

        return RecipeRequest.parse(self.recipe).title

    def full_pipeline(self, model: ModelKind, *, decoder: bool) -> str:
        """The text of all passes that a compilation runs. Raises as `requested_pipeline`."""
        parts = (RAISING_PIPELINE, self.requested_pipeline(model), DECODER_PIPELINE if decoder else "")
        return ",".join(part for part in parts if part)
