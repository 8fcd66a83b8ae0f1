"""Checks a reading of router arithmetic by numbers: traced arithmetic and `moe.route` must give equal gates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moec.dialects.builtin import ConstantOp, FuncOp, ModuleOp, WeightOp
from moec.dialects.moe import Routing, Select
from moec.ir import BlockArgument, DimExpr, Operation, TensorType, Value
from moec.ir.attributes import struct_fields
from moec.passes.matching import shape, tensor
from moec.passes.moe_patterns.reading import RouterReading

if TYPE_CHECKING:
    import torch

    from moec.weights.context import WeightContext

_SPREADS = (0.1, 1.0, 4.0, 1000.0)
# Tokens of each kind of logits, and of all kinds: one run computes them together.
_TOKENS_EACH = 96
_TOKENS = _TOKENS_EACH * (len(_SPREADS) + 2)
# (spread, mean) of random biases; where all are negative, experts outside the best groups that are filled with 0 win
_RANDOM_WEIGHTS = ((0.3, 0.0), (1.0, 0.0), (1.0, -2.0))
_TOLERANCE = 1e-9
# Choice values this close are a tie, which torch breaks at will.
_TIE = 1e-9


@dataclass
class RouterCheck:
    """Compares on random logits of several spreads, with ties, on the weights' own values and on random ones."""

    weights: WeightContext | None
    seed: int = 0
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(self.seed)

    def problem(self, ids: Value, gates: Value, reading: RouterReading) -> str:
        """Why the reading is wrong, in words; empty where every token that is no tie gets the same gates."""
        traced = _slice(ids, gates, reading)
        if isinstance(traced, str):
            return traced
        for values in self._values(traced.weights):
            problem = self._compare(traced, reading, values)
            if problem:
                return problem
        return ""

    def _values(self, weights: list[WeightOp]) -> Iterator[dict[WeightOp, torch.Tensor]]:
        """The weights' own values, then random ones of several spreads and means, in float64."""
        import torch

        if self.weights is not None:
            loaded = self.weights
            yield {op: loaded.load(op.source).to(torch.float64) for op in weights}
        if self.weights is None or weights:
            for spread, mean in _RANDOM_WEIGHTS:
                values = {}
                for op in weights:
                    sizes = tensor(op.value).static_shape
                    normal = torch.randn(sizes, generator=self._generator, dtype=torch.float64)
                    values[op] = normal * spread + mean
                yield values

    def _logits(self, experts: int) -> torch.Tensor:
        """[T, experts]: normal ones of each spread, small integers (ties), some all equal, and all far below zero."""
        import torch

        def normal() -> torch.Tensor:
            return torch.randn(_TOKENS_EACH, experts, generator=self._generator, dtype=torch.float64)

        tied = (normal() * 1.5).round()
        tied[0] = 0.0
        return torch.cat([*[normal() * spread for spread in _SPREADS], tied, normal() - 12.0])

    def _compare(self, traced: _Slice, reading: RouterReading, values: dict[WeightOp, torch.Tensor]) -> str:
        import torch

        from moec.reference.executor import Executor
        from moec.reference.route import RouteInputs, route

        experts = shape(reading.logits)[-1]
        assert isinstance(experts, int)
        logits = self._logits(experts)
        pieces = []
        executor = Executor(traced.module, {}, dtype=torch.float64)
        arguments = {f"weight{position}": values[op] for position, op in enumerate(traced.weights)}
        for start in range(0, len(logits), traced.tokens):
            rows = logits[start : start + traced.tokens]
            padded = torch.cat([rows, rows[-1:].expand(traced.tokens - len(rows), -1)])
            result = executor.run({"logits": padded.reshape(traced.logits_shape), **arguments})
            found = [result[name].reshape(traced.tokens, -1)[: len(rows)] for name in ("ids", "gates")]
            pieces.append(_dense(found[0], found[1], experts))
        expected = torch.cat(pieces)
        inputs = RouteInputs(
            logits, select_bias=result.get("select_bias"), per_expert_scale=result.get("per_expert_scale")
        )
        ids, gates, _ = route(inputs, reading.routing)
        difference = (_dense(ids, gates, experts) - expected).abs().amax(1)
        largest = expected.nan_to_num(0.0).abs().amax(1).clamp_min(abs(reading.routing.scale))
        # the source gives no number, for example 0 / 0
        undefined = expected.isnan().any(1)
        wrong = ~undefined & ~_tied(inputs, reading) & ~(difference <= _TOLERANCE * largest)
        if wrong.any():
            return (
                f"read as {_in_words(reading.routing)}, {int(wrong.sum())} of {len(logits)} random tokens "
                f"get other gates (by up to {float(difference[wrong].max()):.3g})"
            )
        same = ~undefined & (difference <= _TOLERANCE * largest)
        return "" if same.float().mean() > 0.5 else "most random tokens are ties, so that the check says nothing"


def _in_words(routing: Routing) -> str:
    """The stages that do something."""
    shown = {name: getattr(value, "value", value) for name, value in struct_fields(routing)}
    return ", ".join(f"{name} = {value}" for name, value in shown.items())


def _dense(ids: torch.Tensor, gates: torch.Tensor, experts: int) -> torch.Tensor:
    """The gate of each expert [T, experts]."""
    import torch

    return torch.zeros(len(ids), experts, dtype=torch.float64).scatter_add(1, ids.long(), gates.double())


def _tied(inputs: Any, reading: RouterReading) -> torch.Tensor:
    """[T]: whether equal values stand on both sides of the border of a choice."""
    import torch

    from moec.reference.route import score

    routing = reading.routing
    values = inputs.logits if routing.select is Select.SPARSEMIXER else score(inputs, routing).choice
    tied = _border(values, routing.k)
    if routing.select is Select.SPARSEMIXER:
        tied |= _border(values, 1)
    if routing.limits_groups:
        from dataclasses import replace

        free = score(inputs, replace(routing, topk_groups=0)).choice.reshape(len(values), routing.groups, -1)
        best = 1 if routing.group_score.value == "max" else min(2, free.shape[2])
        tied |= _border(free.topk(best, dim=-1).values.sum(-1), routing.topk_groups)
    assert isinstance(tied, torch.Tensor)
    return tied


def _border(values: torch.Tensor, kept: int) -> torch.Tensor:
    """[T]: whether the last kept value of each row equals the first that is not kept."""
    import torch

    if kept >= values.shape[1]:
        return torch.zeros(len(values), dtype=torch.bool)
    ordered = values.sort(dim=-1, descending=True).values
    last, following = ordered[:, kept - 1], ordered[:, kept]
    return (last == following) | (last - following <= _TIE * last.abs().clamp_min(1e-30))


@dataclass(frozen=True)
class _Slice:
    """A module whose `main` takes logits of shape `logits_shape` (`tokens` rows) and the weights, and gives ids, gates
    and, by their names, those of the reading's vectors that there are."""

    module: ModuleOp
    weights: list[WeightOp]
    tokens: int
    logits_shape: tuple[int, ...]


def _slice(ids: Value, gates: Value, reading: RouterReading) -> _Slice | str:
    """What computes ids and gates from logits, or why it cannot be cut out."""
    logits = reading.logits
    vectors = {"select_bias": reading.select_bias, "per_expert_scale": reading.per_expert_scale}
    results = {"ids": ids, "gates": gates, **{name: value for name, value in vectors.items() if value is not None}}
    needed: dict[Operation, None] = {}
    stack = list(results.values())
    while stack:
        value = stack.pop()
        if value is logits:
            continue
        op = value.defining_op
        if isinstance(value, BlockArgument) or op is None:
            return "the gates depend on other inputs than the logits"
        if op not in needed:
            needed[op] = None
            stack.extend(op.operands)
    weights = [op for op in needed if isinstance(op, WeightOp)]
    sizes = _token_sizes(tensor(logits))
    rows = tensor(logits).substitute(sizes)
    if not rows.is_static:
        return f"the sizes of the logits {logits.type} are not known"
    kinds = [rows, *[op.value.type for op in weights]]
    names = ["logits", *[f"weight{position}" for position in range(len(weights))]]
    function = FuncOp.build("main", kinds, arg_names=names)
    mapping: dict[Value, Value] = {logits: function.arguments[0]}
    mapping.update(zip([op.value for op in weights], function.arguments[1:], strict=True))
    for op in _in_order(needed, ids):
        if not isinstance(op, WeightOp):
            function.body.append(_static_copy(op, mapping, sizes))
    function.finish([mapping[value] for value in results.values()], list(results))
    count = 1
    for size in rows.static_shape[:-1]:
        count *= size
    return _Slice(ModuleOp.build([function]), weights, count, rows.static_shape)


def _token_sizes(kind: TensorType) -> dict[str, int | DimExpr]:
    """A number for each symbol: one symbol counts the tokens, the others are 1."""
    names = sorted({name for size in kind.shape if isinstance(size, DimExpr) for name in size.symbols()})
    counting = "seq" if "seq" in names else names[0] if names else ""
    return {name: _TOKENS if name == counting else 1 for name in names}


def _in_order(needed: dict[Operation, None], last: Value) -> list[Operation]:
    """The operations as they stand in their block."""
    op = last.defining_op
    block = op.parent if op is not None else None
    return [op for op in block if op in needed] if block is not None else []


def _static_copy(op: Operation, mapping: dict[Value, Value], sizes: dict[str, int | DimExpr]) -> Operation:
    kinds = []
    for result in op.results:
        kinds.append(tensor(result).substitute(sizes))
    attributes = (
        op.attributes if isinstance(op, ConstantOp) else {k: _sized(v, sizes) for k, v in op.attributes.items()}
    )
    copy = Operation.create(op.name, [mapping[value] for value in op.operands], kinds, attributes, [], op.location)
    mapping.update(zip(op.results, copy.results, strict=True))
    return copy


def _sized(value: Any, sizes: dict[str, int | DimExpr]) -> Any:
    if isinstance(value, DimExpr):
        return value.substitute(sizes)
    if isinstance(value, TensorType):
        return value.substitute(sizes)
    return tuple(_sized(item, sizes) for item in value) if isinstance(value, tuple) else value
