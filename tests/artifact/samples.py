"""A report with everything in it, for the tests of the report and of the manifest."""

from __future__ import annotations

from moec.artifact.ledger import CheckOutcome, LayerError, LedgerEntry, ModelSize
from moec.artifact.measurements import Cost, LossRow, SpeedRow, StepTime, VerificationRow, this_machine
from moec.artifact.report import ExpertClassFacts, LayerFacts, LoweringFacts, Report


def sample_report() -> Report:
    """Four layers: one dense, one with eight equal experts, one with two classes, one plain attention layer."""
    equal = ExpertClassFacts(experts=tuple(range(8)), width=192, body="SwiGLU", bytes_per_expert=294912)
    wide = ExpertClassFacts(experts=(0, 2), width=192, body="SwiGLU", bytes_per_expert=294912)
    narrow = ExpertClassFacts(experts=(1, 3, 4), width=96, body="SwiGLU", bytes_per_expert=147456)
    layers = tuple(
        LayerFacts(
            name=f"layers.{index}",
            kind=kind,
            router_outputs=8 if classes else 0,
            top_k=2 if classes else 0,
            routing="softmax, top-2, renormalised" if classes else "",
            classes=classes,
            stored=tuple(range(sum(len(group.experts) for group in classes))),
            expert_bytes=sum(len(group.experts) * group.bytes_per_expert for group in classes),
            feed_forward_bytes=feed_forward,
            other_bytes=200704,
        )
        for index, (kind, classes, feed_forward) in enumerate(
            [("dense", (), 900000), ("moe", (equal,), 0), ("moe", (wide, narrow), 120000), ("dense", (), 0)]
        )
    )
    before = ModelSize(parameters=3085440, bytes=12341760, active_flops=2631936, operations=340)
    after = ModelSize(parameters=3000000, bytes=12000000, active_flops=2500000, operations=120)
    return Report(
        title="tiny-moe",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        target="portable",
        dtype="float32",
        pipeline="raise-nn,raise-moe,narrow{layer=2}",
        parameters=3000000,
        active_parameters=1300000,
        active_flops=2500000,
        source_bytes=12341760,
        artifact_bytes=12000000,
        layers=layers,
        lowerings=(
            LoweringFacts(layer="layers.1", lowering="lean", reason="8 experts", nodes=49, parity=None),
            LoweringFacts(layer="layers.2", lowering="fused", reason="many experts", nodes=7, parity=3e-7),
        ),
        nodes=312,
        without_genai=None,
        ledger=(
            LedgerEntry(
                pass_text="raise-nn",
                claim="exact",
                outcome=CheckOutcome.WITHIN_BOUND,
                layer_errors=(),
                before=before,
                after=before,
                seed=0,
            ),
            LedgerEntry(
                pass_text="narrow{layer=2}",
                claim="lossy",
                outcome=CheckOutcome.MEASURED,
                layer_errors=(LayerError(layer="layers.2", relative_error=0.0123),),
                before=before,
                after=after,
                seed=0,
            ),
        ),
        verification=(
            VerificationRow(
                comparison="artifact against IR", relative_difference=3.1e-6, bound=1e-4, ties=1, tokens=512
            ),
        ),
        losses=(
            LossRow(subject="source", text="kjv", tokens=2048, nats_per_token=3.72, nats_per_byte=1.07),
            LossRow(subject="artifact", text="kjv", tokens=2048, nats_per_token=3.73, nats_per_byte=1.08),
        ),
        speeds=(
            SpeedRow(
                task="decode, batch 1",
                subject="artifact",
                tokens_per_second=2100.0,
                bound_tokens_per_second=2500.0,
            ),
            SpeedRow(task="decode, batch 1", subject="transformers, eager", tokens_per_second=130.0),
        ),
        steps=(StepTime(step="trace", seconds=1.2, cpu_seconds=1.1, peak_memory_bytes=300 * 2**20),),
        predicted=Cost(seconds=8.0, memory_bytes=5 * 2**20, disk_bytes=12 * 2**20),
        actual=Cost(seconds=7.1, memory_bytes=6 * 2**20, disk_bytes=12 * 2**20),
        machine=this_machine(),
        versions={"moec": "0.1.0", "torch": "2.13.0"},
    )
