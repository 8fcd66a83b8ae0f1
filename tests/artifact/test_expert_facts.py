"""What reports say of experts: kind, width and rank from bodies, aliases, use, and how they are drawn."""

from __future__ import annotations

import re

import pytest

from moec.artifact.expert_facts import BodyFacts, body_facts
from moec.artifact.expert_picture import expert_picture
from moec.artifact.expert_rows import describe_experts, describe_widths, expert_rows
from moec.artifact.report import ExpertClassFacts, ExpertUse, LayerFacts, render_report
from moec.artifact.summary import layer_facts, model_size
from moec.dialects.moe import ExpertClass, Routing
from moec.ir import Location, Region
from tests.artifact.samples import sample_report
from tests.codegen.running import module_of
from tests.ir.build import swiglu_body
from tests.ir.expert_bodies import Kind, affine, constant, dense, latent, low_rank, mixed_layer

HIDDEN = 12
KINDS = {
    "dense": (dense(HIDDEN, 8, bias=True), BodyFacts("SwiGLU", 8, 0)),
    "low rank": (low_rank(HIDDEN, 8, 3), BodyFacts("low-rank SwiGLU", 8, 3)),
    "base": (low_rank(HIDDEN, 8, 3, base=True), BodyFacts("SwiGLU on a shared base", 8, 3)),
    "latent": (latent(HIDDEN, 8, 5), BodyFacts("latent SwiGLU", 8, 5)),
    "constant": (constant(HIDDEN), BodyFacts("constant", 0, 0)),
    "affine": (affine(HIDDEN, 2), BodyFacts("affine", 0, 2)),
}


def facts_of(kind: Kind) -> BodyFacts:
    return body_facts(kind.body, ExpertClass((0,), len(kind.own) + len(kind.shared), len(kind.shared)))


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_a_body(name: str) -> None:
    kind, expected = KINDS[name]
    assert facts_of(kind) == expected


def test_gate_and_up_in_one_product() -> None:
    region: Region = swiglu_body(HIDDEN, 7)
    assert body_facts(region, ExpertClass((0,), 2)) == BodyFacts("SwiGLU", 7, 0)


def layer() -> LayerFacts:
    """Ragged widths, factors, a constant, an alias, a null output, one protected expert, calibrated."""
    return LayerFacts(
        name="model.layers.0",
        kind="moe",
        router_outputs=6,
        top_k=2,
        routing="softmax, top-2",
        classes=(
            ExpertClassFacts(experts=(0, 2), width=64, body="SwiGLU", bytes_per_expert=4096),
            ExpertClassFacts(experts=(1,), width=24, rank=5, body="low-rank SwiGLU", bytes_per_expert=1024),
            ExpertClassFacts(experts=(3,), width=0, body="constant", bytes_per_expert=48),
        ),
        stored=(0, 1, 2, 3, 0, -1),
        protected=(2,),
        use=ExpertUse(tokens=200, chosen=(100, 50, 150, 0), gate_mass=(40.0, 10.0, 50.0, 0.0)),
        expert_bytes=9264,
    )


def test_rows_are_sorted_and_know_their_outputs() -> None:
    rows = expert_rows(layer())
    assert [(row.number, row.outputs, row.protected) for row in rows] == [
        (0, (0, 4), False),
        (1, (1,), False),
        (2, (2,), True),
        (3, (3,), False),
    ]
    assert [row.chosen for row in rows] == [0.5, 0.25, 0.75, 0.0]
    assert [row.gate_mass for row in rows] == [0.4, 0.1, 0.5, 0.0]
    assert all(row.chosen is None for row in expert_rows(layer().model_copy(update={"use": None})))


def test_a_layer_in_words() -> None:
    assert describe_experts(layer()) == "2 SwiGLU + 1 low-rank SwiGLU + 1 constant, 1 alias, 1 output to none"
    assert describe_widths(layer()) == "24–64"


def test_drawing() -> None:
    picture = expert_picture([layer(), LayerFacts(name="model.layers.1", kind="dense")])
    assert picture is not None
    [row] = picture.rows
    assert [bar.height for bar in row.bars] == [26.0, 9.8, 26.0, 3.0]
    assert [bar.outputs for bar in row.bars] == [2, 1, 1, 1]
    assert row.bars[2].chosen == 1.0
    assert "width 24, rank 5" in row.bars[1].text and "protected" in row.bars[2].text
    page = render_report(sample_report().model_copy(update={"layers": (layer(),)}))
    assert len(re.findall(r"<title>model\.layers\.0: expert \d", page)) == 4
    assert page.count('stroke="var(--ink)"') == 1
    assert expert_picture([LayerFacts(name="model.layers.1", kind="dense")]) is None
    assert "<h2>Experts</h2>" not in render_report(sample_report().model_copy(update={"layers": ()}))


def test_many_experts_stay_inside_the_drawing() -> None:
    many = ExpertClassFacts(experts=tuple(range(512)), width=8, body="SwiGLU", bytes_per_expert=64)
    picture = expert_picture([LayerFacts(name="a", kind="moe", classes=(many,), stored=tuple(range(512)))])
    assert picture is not None
    assert max(bar.x for bar in picture.rows[0].bars) + picture.bar_width <= 950


def test_layer_facts_of_mixed_experts() -> None:
    made = mixed_layer(
        [(dense(HIDDEN, 8), (0, 2)), (low_rank(HIDDEN, 6, 2, base=True), (1, 3))],
        (0, 1, 2, 3, 3, -1),
        hidden=HIDDEN,
        routing=Routing(k=2),
        protected=(1,),
    )
    made.experts.location = Location(name="model.layers.7.mlp.experts")
    module = module_of(made.op, made.weights)
    [mixture, rest] = layer_facts(module)
    assert mixture.name == "model.layers.7"
    assert (mixture.stored, mixture.protected, mixture.use) == ((0, 1, 2, 3, 3, -1), (1,), None)
    assert [(group.body, group.width, group.rank) for group in mixture.classes] == [
        ("SwiGLU", 8, 0),
        ("SwiGLU on a shared base", 6, 2),
    ]
    assert mixture.classes[1].shared_bytes == 4 * 3 * HIDDEN * 6
    assert rest.total_bytes == 4 * 6 * HIDDEN
    assert mixture.expert_bytes == model_size(module).bytes - rest.total_bytes
