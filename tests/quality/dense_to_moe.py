"""Losses of a dense model whose feed-forward blocks became experts: partition, router and number of experts.

    python -m tests.quality.dense_to_moe                      # the table for examples/models/tiny-dense
    python -m tests.quality.dense_to_moe --model FOLDER       # another dense model, on the same texts

Calibration text and held-out text are different passages; nothing is chosen by a result, so no third text is needed.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import moec
from moec.artifact.options import RAISING_PIPELINE
from moec.calibration.sample import spread_rows
from moec.dialects import aten
from moec.dialects.builtin import ModuleOp
from moec.errors import MoecError
from moec.experts import (
    FeedForward,
    MoeLayer,
    find_dense_layers,
    find_moe_layers,
    load_dense,
    load_expert,
    replace_routing,
)
from moec.experts.parts import new_weight, store_tensor, tensor_of
from moec.experts.router_source import feed_router
from moec.frontend.huggingface import load_huggingface
from moec.ir import TensorType, Value
from moec.module import Module
from moec.passes.router_init.solutions import expert_importance
from moec.weights.store import WeightStore
from tests.quality import harness

MODEL = harness.REPOSITORY / "examples" / "models" / "tiny-dense"
CALIBRATION = tuple(harness.CALIBRATION_TEXTS / f"{name}.calibration.txt" for name in ("kjv", "shakespeare"))
HELDOUT = tuple(harness.EXAMPLE_TEXTS / f"{name}.heldout.txt" for name in ("kjv", "shakespeare"))
SEEDS = (0, 1, 2)
EXPERTS = 8
ACTIVE = (8, 6, 4, 2)
LENGTH = 64
ORACLE_ROWS = 2048
"""Rows that the output scale of the oracle's choice is found on."""

PARTITIONS = {
    "contiguous": "partition=contiguous",
    "random": "partition=random",
    "k-means": "partition=k-means",
    "k-means, up": "partition=k-means rows=up",
    "co-activation": "partition=co-activation",
    "co-activation, graph": "partition=co-activation-graph",
    "gradient": "partition=gradient",
    "CMoE, 1 shared": "partition=co-activation shared={expert} shared_by=activation-rate",
}
"""Options of factorize; `{expert}` is the width of an expert."""

RANDOM, CENTROID, LEAST_SQUARES, ORACLE = "random", "weight-centroid", "least-squares", "oracle"
ROUTERS = (ORACLE, LEAST_SQUARES, CENTROID, RANDOM)


@dataclass(frozen=True)
class Source:
    """A gated dense model, and how many windows of `LENGTH` tokens are read in all and of each held-out text."""

    folder: Path = MODEL
    calibration: int = 128
    heldout: int = 48
    gradients: bool = True


TINY = Source()


@dataclass(frozen=True)
class Setting:
    """One row of the table: how neurons are divided and experts are chosen.

    `seed` is that of the calibration, of the router and, without a `partition_seed`, of the partition.
    """

    partition: str
    router: str = LEAST_SQUARES
    seed: int = 0
    partition_seed: int | None = None
    calibrated_scale: bool = False
    experts: int = EXPERTS


def loss(setting: Setting, k: int, source: Source = TINY) -> float:
    """Held-out loss in nats per byte, the mean over the texts, with k experts for each token."""
    return _loss(setting, k, source)


@functools.cache
def dense_loss(source: Source = TINY) -> float:
    """The same of the dense model."""
    return heldout_loss(raised(source), source)


def neuron_level_loss(share: float, source: Source = TINY) -> float:
    """The same where each token runs the share of its neurons that give most: what experts of one neuron could do."""
    width = _width(source)
    return loss(Setting("contiguous", ORACLE, experts=width), max(1, round(share * width)), source)


def scales(setting: Setting, k: int, source: Source = TINY) -> list[float]:
    """The calibrated scale of each layer."""
    module = routed_to(dataclasses.replace(setting, calibrated_scale=True), k, source)
    return [layer.route.routing.scale for layer in find_moe_layers(module.op)]


@functools.cache
def _loss(setting: Setting, k: int, source: Source) -> float:
    return heldout_loss(routed_to(setting, k, source), source)


def routed_to(setting: Setting, k: int, source: Source = TINY) -> Module:
    """The model with k experts for each token, the caller's own."""
    module = copied(_routed(setting, source))
    by_pass = setting.calibrated_scale and setting.router != ORACLE
    moec.run_passes(module, f"set-routing{{k={k} {'scale=calibrated' if by_pass else ''}}}", seed=setting.seed)
    if setting.calibrated_scale and not by_pass:
        _scale_oracle(module, k)
    return module


def heldout_loss(module: Module, source: Source) -> float:
    found = [harness.loss(module, text, sequences=source.heldout, length=LENGTH).mean() for text in HELDOUT]
    return float(sum(found) / len(found))


@functools.cache
def _routed(setting: Setting, source: Source) -> Module:
    """The calibrated model with experts, all chosen, and their router."""
    module = copied(_calibrated(source, setting.seed))
    options = PARTITIONS[setting.partition].format(expert=_width(source) // setting.experts)
    experts = setting.experts - ("shared=" in options)
    partition_seed = setting.seed if setting.partition_seed is None else setting.partition_seed
    moec.run_passes(module, f"factorize{{experts={experts} {options}}}", seed=partition_seed)
    if setting.router != ORACLE:
        moec.run_passes(module, f"init-router{{kind={setting.router}}}", seed=setting.seed)
        return module
    for layer in find_moe_layers(module.op):
        _route_by_activity(layer, module)
    return module


def _route_by_activity(layer: MoeLayer, module: Module) -> None:
    """Lets the router compute all neurons, and rank experts by the sum over their neurons of |phi_i| ||D_i||."""
    blocks = _gated_experts(layer, module)
    router = layer.router
    rows = router.tensor("input")
    tokens = tensor_of(rows).shape[:-1]

    def append(name: str, tensors: dict[str, Value | tuple[Value, ...]], size: int) -> Value:
        op = aten.build(name, tensors, (TensorType((*tokens, size), tensor_of(rows).dtype),))
        op.insert_before(router)
        return op.result

    def project(name: str, matrices: list[torch.Tensor]) -> Value:
        matrix = torch.cat(matrices)
        weight = new_weight(layer, f"{layer.name}.all.{name}", store_tensor(module.weights, matrix), matrix.shape)
        return append("linear.default", {"input": rows, "weight": weight}, len(matrix))

    gate = project("gate", [block.gate.dense() for block in blocks if block.gate is not None])
    up = project("up", [block.up.dense() for block in blocks])
    width = sum(block.width for block in blocks)
    hidden = append("mul.Tensor", {"self": append("silu.default", {"self": gate}, width), "other": up}, width)
    sums = torch.block_diag(*[block.down.dense().norm(dim=0)[None] for block in blocks])
    feed_router(layer, module.weights, append("abs.default", {"self": hidden}, width), sums)


def choose_by_activity(module: Module, k: int, *, calibrated_scale: bool) -> None:
    """Lets each token of a calibrated model have the k experts that give it most, whatever their router was."""
    for layer in find_moe_layers(module.op):
        _route_by_activity(layer, module)
    moec.run_passes(module, f"set-routing{{k={k} combine=one}}")
    if calibrated_scale:
        _scale_oracle(module, k)


def _scale_oracle(module: Module, k: int) -> None:
    for layer in find_moe_layers(module.op):
        replace_routing(layer, dataclasses.replace(layer.route.routing, scale=_oracle_scale(layer, k, module)))


def _oracle_scale(layer: MoeLayer, k: int, module: Module) -> float:
    """What set-routing{scale=calibrated} would find: the rows that this router reads are too wide to be kept."""
    assert module.calibration is not None
    blocks, sample = _gated_experts(layer, module), module.calibration.sample(layer)
    sample = sample.subset(spread_rows(len(sample), ORACLE_ROWS))
    product, energy = 0.0, 0.0
    for x, wanted in zip(sample.x.float().split(1024), sample.y.double().split(1024), strict=True):
        chosen = torch.zeros(len(x), len(blocks)).scatter_(1, expert_importance(blocks, x).topk(k).indices, 1.0)
        parts = [block.hidden_activations(x) @ block.down.dense().T for block in blocks]
        y = torch.einsum("ne,enh->nh", chosen, torch.stack(parts)).double()
        product, energy = product + float((y * wanted).sum()), energy + float(y.square().sum())
    return product / energy


def _gated_experts(layer: MoeLayer, module: Module) -> list[FeedForward]:
    experts = [load_expert(layer, module.weights, number) for number in range(layer.expert_count)]
    blocks = [expert for expert in experts if isinstance(expert, FeedForward) and expert.gate is not None]
    assert len(blocks) == len(experts)
    return blocks


@functools.cache
def _calibrated(source: Source, seed: int) -> Module:
    module = copied(raised(source))
    texts = ",".join(map(str, CALIBRATION))
    read = f"text={texts} sequences={source.calibration} length={LENGTH} reservoir={source.calibration * LENGTH}"
    moec.run_passes(module, f"calibrate{{{read} gradients={str(source.gradients).lower()}}}", seed=seed)
    return module


@functools.cache
def _scratch_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="moec-dense-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def raised(source: Source) -> Module:
    module = load_huggingface(source.folder, WeightStore(_scratch_folder()))
    moec.run_passes(module, RAISING_PIPELINE)
    return module


@functools.cache
def _width(source: Source) -> int:
    module = raised(source)
    return load_dense(find_dense_layers(module.op)[0], module.weights).width


def copied(module: Module) -> Module:
    clone = module.op.clone()
    assert isinstance(clone, ModuleOp)
    return dataclasses.replace(module, op=clone)


def print_table(source: Source, seeds: tuple[int, ...], partitions: list[str]) -> None:
    """Partition by router by number of experts, all seeds, and the bounds."""
    columns = "".join(f"{f'{k} of {EXPERTS}':>24}" for k in ACTIVE)
    print(f"nats per byte; dense {dense_loss(source):.4f}; seeds {', '.join(map(str, seeds))}")
    print(f"{'partition':22}{'router':18}{columns}", flush=True)
    for partition in partitions:
        for router in ROUTERS:
            for calibrated in (False, True) if router == LEAST_SQUARES else (False,):
                cells = []
                for k in ACTIVE:
                    settings = [Setting(partition, router, seed, calibrated_scale=calibrated) for seed in seeds]
                    try:
                        # with a shared expert, which every token runs, one expert less is chosen
                        chosen = k - (EXPERTS - expert_count(settings[0], source))
                        cells.append(" ".join(f"{loss(one, chosen, source):.4f}" for one in settings))
                    except MoecError as error:
                        cells.append(error.message[:22])
                name = f"{router}, scaled" if calibrated else router
                print(f"{partition:22}{name:18}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    shares = ", ".join(f"{k / EXPERTS:.0%} {neuron_level_loss(k / EXPERTS, source):.4f}" for k in ACTIVE[1:])
    print(f"single neurons, by what they give: {shares}")


def expert_count(setting: Setting, source: Source = TINY) -> int:
    """Experts that a token chooses among."""
    return find_moe_layers(_routed(setting, source).op)[0].outputs


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description="Losses of a dense model as experts.")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder with a gated dense model")
    parser.add_argument("--seed", type=int, action="append", help="only this seed; may be repeated")
    parser.add_argument("--partition", choices=sorted(PARTITIONS), action="append", help="only this; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_table(Source(arguments.model), tuple(arguments.seed or SEEDS), arguments.partition or list(PARTITIONS))


if __name__ == "__main__":
    main()
