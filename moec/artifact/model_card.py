"""README.md of a Hugging Face folder: what the model was made from, how, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from moec import __version__
from moec.artifact.ledger import LedgerEntry
from moec.artifact.loss import LossSettings, measure_loss
from moec.artifact.manifest import FileRecord
from moec.artifact.report import format_number, format_size
from moec.artifact.text import TOKENIZER_FILE, TextCodec

if TYPE_CHECKING:
    from moec.codegen.huggingface.emit import HuggingFaceReport
    from moec.module import Module

CARD_NAME = "README.md"
_LOSS = LossSettings(window=64, limit=2048)


@dataclass(frozen=True)
class CardLoss:
    """Nats per token on the first tokens of a text, before and after, to four decimals."""

    text: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Card:
    """The facts of the card. It names no path and no time: equal inputs give equal bytes.

    `recipe` and `pipeline` are what the user asked for, `ledger` all passes that ran. `parameters` are those of the
    source and of the written model.
    """

    module: Module
    recipe: str
    pipeline: str
    source_files: Mapping[str, FileRecord]
    parameters: tuple[int, int]
    written: HuggingFaceReport
    ledger: tuple[LedgerEntry, ...]
    loss: CardLoss | None


def write_card(folder: Path, card: Card) -> None:
    """Writes README.md into `folder`."""
    environment = Environment(
        loader=PackageLoader("moec.artifact", "."),
        # Markdown, not HTML; names of tensors and layers were checked when they were read.
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["size"] = format_size
    environment.filters["number"] = format_number
    text = environment.get_template("model_card.md.j2").render(card=card, version=__version__)
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def measure_card_loss(original: Module, module: Module, text: Path | None) -> CardLoss | None:
    """Losses of source and IR on `text` by the reference executor; None without a text, a tokenizer or a decoder.

    Raises UsageError for a text that is shorter than one window.
    """
    from moec.artifact.evaluation import source_scorer

    folder = module.source.folder
    if text is None or folder is None or module.source.kind != "decoder" or not (folder / TOKENIZER_FILE).is_file():
        return None
    tokens = TextCodec(folder).read(text)
    before, after = (measure_loss(tokens, "", source_scorer(item), _LOSS) for item in (original, module))
    return CardLoss(text.name, after.tokens, round(before.nats_per_token, 4), round(after.nats_per_token, 4))
