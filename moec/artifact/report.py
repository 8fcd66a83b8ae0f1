"""`report.json`, the facts about an artifact, and `report.html`, the same facts to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field

from moec.artifact.ledger import LedgerEntry
from moec.artifact.measurements import Comparison, Cost, LossRow, Machine, SpeedRow, StepTime, VerificationRow
from moec.budget.sizes import format_size as format_size
from moec.record import Record, read_record, write_record

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"


class ExpertClassFacts(Record):
    """The experts of one layer that have the same body, by stored id; `shared_bytes` is what all of them read."""

    experts: tuple[int, ...]
    width: int = Field(ge=0)
    body: str
    rank: int = Field(default=0, ge=0)
    bytes_per_expert: int = Field(ge=0)
    shared_bytes: int = Field(default=0, ge=0)


class ExpertUse(Record):
    """What calibration saw: of `tokens` tokens, how many chose each stored expert, and the sum of their gates."""

    tokens: int = Field(ge=0)
    chosen: tuple[int, ...]
    gate_mass: tuple[float, ...]


class LayerFacts(Record):
    """One layer. `classes` is empty for a dense one; `other_bytes` is what is neither experts nor feed-forward block.

    `stored` names for each router output its stored expert, -1 for none. What an earlier layer holds already is not in
    the bytes.
    """

    name: str
    kind: str
    router_outputs: int = Field(default=0, ge=0)
    top_k: int = Field(default=0, ge=0)
    routing: str = ""
    classes: tuple[ExpertClassFacts, ...] = ()
    stored: tuple[int, ...] = ()
    protected: tuple[int, ...] = ()
    use: ExpertUse | None = None
    expert_bytes: int = Field(default=0, ge=0)
    feed_forward_bytes: int = Field(default=0, ge=0)
    other_bytes: int = Field(default=0, ge=0)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights of the layer."""
        return self.expert_bytes + self.feed_forward_bytes + self.other_bytes


class LoweringFacts(Record):
    """How the backend emitted the experts of one layer, and why; `parity` is the difference that its gate measured."""

    layer: str
    lowering: str
    reason: str
    nodes: int = Field(ge=0)
    parity: float | None


class Report(Record):
    """The content of report.json."""

    title: str
    architecture: str
    model_type: str
    target: str
    dtype: str
    pipeline: str
    parameters: int
    active_parameters: int
    active_flops: int
    source_bytes: int
    artifact_bytes: int
    layers: tuple[LayerFacts, ...]
    lowerings: tuple[LoweringFacts, ...]
    nodes: int
    without_genai: str | None
    checkpoint_bytes: int = 0
    """Bytes of the Hugging Face checkpoint; 0 where there is none."""

    ledger: tuple[LedgerEntry, ...]
    verification: tuple[VerificationRow, ...]
    losses: tuple[LossRow, ...]
    comparison: Comparison | None = None
    speeds: tuple[SpeedRow, ...]
    steps: tuple[StepTime, ...]
    predicted: Cost
    actual: Cost
    machine: Machine
    versions: dict[str, str]


def layer_runs(layers: Sequence[LayerFacts]) -> list[tuple[str, LayerFacts]]:
    """Neighbours that differ only in name and use, as one: (`model.layers.0 … 29`, the first of them)."""
    without = {"name": "", "use": None}
    runs: list[tuple[LayerFacts, LayerFacts]] = []
    for layer in layers:
        if runs and layer.model_copy(update=without) == runs[-1][0].model_copy(update=without):
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return [
        (first.name if first is last else f"{first.name} … {last.name.rpartition('.')[2]}", first)
        for first, last in runs
    ]


def write_report(folder: Path, report: Report) -> None:
    """Writes report.json and report.html into `folder`."""
    write_record(folder / REPORT_JSON, report)
    (folder / REPORT_HTML).write_text(render_report(report), encoding="utf-8")


def read_report(folder: Path) -> Report:
    """Reads report.json of an artifact."""
    return read_record(folder / REPORT_JSON, Report)


def render_report(report: Report) -> str:
    """The report as one HTML page that needs nothing else: style and drawings are inside, scripts there are none."""
    # they read the facts that this module defines
    from moec.artifact.expert_picture import expert_picture, kind_colour
    from moec.artifact.expert_rows import describe_experts, describe_widths

    environment = Environment(
        loader=PackageLoader("moec.artifact", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = format_size
    environment.filters["number"] = format_number
    environment.filters["colour"] = kind_colour
    environment.filters["experts"] = describe_experts
    environment.filters["widths"] = describe_widths
    return environment.get_template("report.html.j2").render(
        report=report, runs=layer_runs(report.layers), picture=expert_picture(report.layers)
    )


def format_number(number: float) -> str:
    """A count with separators, or a measured value with three significant digits."""
    if isinstance(number, int):
        return f"{number:,}"
    if number != 0 and (abs(number) < 1e-3 or abs(number) >= 1e6):
        return f"{number:.2e}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
