"""Decides what a checkpoint of a module is: the config whose model computes the same, and where each tensor comes from.

The config of the source is changed until transformers' model of it has the operations of our IR, weights aside. What
no config can say is refused, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from moec.codegen.huggingface.experts import (
    Change,
    LayerPair,
    Layout,
    find_changes,
    needs_of,
    produce,
    read_layout,
)
from moec.codegen.huggingface.fields import Values, candidates, top_k_change, with_field, with_shapes
from moec.codegen.huggingface.fill import can_fill, fill_layers
from moec.codegen.huggingface.hosts import choose_host, needs_host
from moec.codegen.huggingface.layout import tied_names
from moec.codegen.huggingface.matching import Match, match_modules
from moec.codegen.huggingface.routing import routing_candidates, routing_difference
from moec.codegen.huggingface.sizes import Sizes, aligned, common_needs, shape_changes, wanted_shapes, wider
from moec.codegen.huggingface.template import Template, build_template, has_cache
from moec.codegen.huggingface.values import Producer, Taken, rearranged
from moec.errors import MoecError, UnsupportedModelError
from moec.experts import find_moe_layers
from moec.frontend.checkpoint_mapping import map_checkpoint
from moec.module import Module
from moec.weights.expression import Expression
from moec.weights.expression_parser import parse_expression
from moec.weights.tensor_spec import TensorSpec


@dataclass
class CheckpointPlan:
    """The config values and their model, and the numbers of its parameters by name.

    `changes`: what is written larger than the IR has it, because transformers has no smaller form.
    """

    template: Template
    producers: dict[str, Producer] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class _Fit:
    """A template beside our module, and what fits."""

    template: Template
    match: Match
    pairs: tuple[LayerPair, ...]

    @staticmethod
    def of(values: Values, module: Module, traced: Module | None = None) -> _Fit:
        template = build_template(values, with_cache=has_cache(module), traced=traced)
        match = match_modules(template.module, module)
        expected = {layer.experts: layer for layer in find_moe_layers(template.module.op)}
        found = {layer.experts: layer for layer in find_moe_layers(module.op)}
        ours = {two: one for one, two in match.experts.items()}
        pairs = tuple(
            LayerPair(ours[op], op, expected.get(ours[op]), found.get(op)) for op in module.op.walk() if op in ours
        )
        return _Fit(template, match, pairs)

    def sizes(self, module: Module) -> Sizes | None:
        """What the layers need; None without layers."""
        if not self.pairs:
            return None
        old = [
            (pair.name, needs_of(pair.template, pair.template_layer, self.template.module.weights))
            for pair in self.pairs
        ]
        new = [(pair.name, needs_of(pair.ours, pair.layer, module.weights)) for pair in self.pairs]
        sizes = Sizes(common_needs(old), common_needs(new, fillable=can_fill(module)))
        return sizes.with_width(aligned(sizes.new.width, sizes.old.width))


def plan_checkpoint(module: Module, *, uniform: bool, traced: Module | None = None) -> CheckpointPlan:
    """The plan for a raised module that came from a Hugging Face folder.

    `uniform` permits changes that keep the function: copies of shared experts, zero neurons, products of factors.
    `traced` as in `build_template`.
    Raises UnsupportedModelError, naming the layer and what to do, where transformers has no model of these operations.
    """
    filled: tuple[Change, ...] = ()
    if uniform:
        module, filled = fill_layers(module)
    values = {key: value for key, value in module.config.items() if key != "quantization_config"}
    if module.source.folder is not None and needs_host(module):
        tried: list[_Fit] = []
        module, values, more = choose_host(module, values, uniform=uniform, fits=partial(_difference_of, tried))
        filled, fit = (*filled, *more), tried[-1]
    else:
        fit = _Fit.of(values, module, traced)
    sizes = fit.sizes(module)
    if sizes is not None and sizes.old != sizes.new:
        fit = _resized(values, fit, sizes, module, uniform)
    fit = _with_router_scalars(fit, module)
    difference = fit.match.first_difference
    if difference is not None:
        raise UnsupportedModelError(
            f"transformers' {fit.template.source.model_class.__name__} cannot compute what this IR computes: "
            f"{difference.text}",
            where=difference.place,
            hint="emit ONNX, which takes any IR",
        )
    plan = CheckpointPlan(fit.template, changes=[*filled])
    for pair in fit.pairs:
        _plan_layer(plan, pair, module)
    if plan.changes and not uniform:
        some = "; ".join(f"{change.place}: {change.text}" for change in plan.changes[:3])
        rest = f"; and {len(plan.changes) - 3} more" if len(plan.changes) > 3 else ""
        raise UnsupportedModelError(
            f"transformers stores all experts alike; the same function would need {some}{rest}",
            hint="--uniform writes it so; the function stays the same, the folder becomes larger"
            + _instead(plan.changes),
        )
    _plan_weights(plan, fit.match, module)
    return plan


def _difference_of(tried: list[_Fit], values: Values, module: Module) -> str | None:
    """What keeps the model of config values from being ours, None where nothing does; raises as `build_template`."""
    with _silent():
        tried.append(_Fit.of(values, module))
    difference = tried[-1].match.first_difference
    return None if difference is None else str(difference)


def _with_router_scalars(fit: _Fit, module: Module) -> _Fit:
    """The fit of a config whose scalars say how routers work, where one of the scalars is all that differs.

    A factor of the experts' sum that no scalar holds stays; the experts carry it.
    """
    routes = fit.match.routes
    wrong = fit.match.first_difference is not None and any(routing_difference(*pair) for pair in routes)
    if not wrong and all(pair.factor == 1.0 for pair in fit.pairs):
        return fit
    scales = {(one.routing.scale, two.routing.scale) for one, two in routes}
    for candidate in routing_candidates(fit.template.values, scales.pop() if len(scales) == 1 else None, wrong):
        try:
            with _silent():
                found = _Fit.of(candidate, module)
        except MoecError:
            continue
        if found.match.first_difference is None and (wrong or all(pair.factor == 1.0 for pair in found.pairs)):
            return found
    return fit


def _instead(changes: list[Change]) -> str:
    """What passes would have left in a form that transformers has."""
    found = dict.fromkeys(change.instead for change in changes if change.instead)
    return f"; uniform from the start is {' and '.join(found)}" if found else ""


def _resized(values: Values, fit: _Fit, sizes: Sizes, module: Module, uniform: bool) -> _Fit:
    """The template of a config with our sizes. Raises UnsupportedModelError where there is none."""
    layouts = [(pair, read_layout(pair, fit.template.module.weights)) for pair in fit.pairs]
    starts = _with_sizes(values, fit, layouts, sizes)
    if not starts:
        width = next(
            (
                width
                for width in wider(values, sizes)
                if (starts := _with_sizes(values, fit, layouts, sizes.with_width(width)))
            ),
            0,
        )
        changes = " and ".join(f"{change.what} {change.old} -> {change.new}" for change in shape_changes(sizes))
        if not width or not uniform:
            raise UnsupportedModelError(
                f"no field of the config changes the {changes} and nothing else",
                hint=f"--uniform pads the experts with zero neurons to a width of {width}, which a config can say"
                if width
                else "emit ONNX, which takes any sizes",
            )
    reason: MoecError | None = None
    first: _Fit | None = None
    for result in _with_top_k(starts, sizes):
        try:
            with _silent():
                found = _Fit.of(result, module)
        except UnsupportedModelError as error:
            reason = reason or error
            continue
        first = first or found
        if found.match.first_difference is None:
            return found
    if first is not None:
        return first
    if reason is None:
        raise UnsupportedModelError(f"no field of the config holds the number of experts per token, {sizes.old.slots}")
    raise UnsupportedModelError(
        f"transformers has no model of these sizes: {reason.message}",
        where=reason.where,
        hint="keep more experts, or emit ONNX, which takes any sizes",
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Around a model that may turn out to be none: torch would print its own report of that."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _with_sizes(values: Values, fit: _Fit, layouts: list[tuple[LayerPair, Layout]], sizes: Sizes) -> list[Values]:
    changes = shape_changes(sizes)
    return with_shapes(values, changes, wanted_shapes(fit.template, fit.match, layouts, sizes)) if changes else [values]


def _with_top_k(starts: list[Values], sizes: Sizes) -> Iterator[Values]:
    for start in starts:
        if sizes.old.slots == sizes.new.slots:
            yield start
            continue
        change = top_k_change(sizes.old.slots, sizes.new.slots)
        for place in candidates(start, change):
            yield with_field(start, place, change.new)


def _plan_layer(plan: CheckpointPlan, pair: LayerPair, module: Module) -> None:
    weights = plan.template.module.weights
    layout = None
    if not pair.is_unchanged:
        layout = read_layout(pair, weights)
        plan.changes += find_changes(pair, layout, module.weights)
    plan.producers.update(produce(pair, layout, weights, module.weights))


def _plan_weights(plan: CheckpointPlan, match: Match, module: Module) -> None:
    """Adds the parameters outside of the experts, and those that the results do not depend on, from the source."""
    specs, context = plan.template.specs, plan.template.module.weights

    def spec_of(expression: Expression) -> TensorSpec:
        return TensorSpec(*context.shape_dtype(expression))

    for source, (_, ours) in match.weights.items():
        name, producer = rearranged(
            parse_expression(source), spec_of, Taken(parse_expression(ours.source), module.weights)
        )
        plan.producers[name] = producer
    tied = tied_names(plan.template.model)
    for name, stored in tied.items():
        if name in plan.producers:
            plan.producers.setdefault(stored, plan.producers[name])
    missing = [name for name in specs if name not in plan.producers and tied.get(name, name) not in plan.producers]
    if missing:
        _plan_unused(plan, missing, module)


def _plan_unused(plan: CheckpointPlan, names: list[str], module: Module) -> None:
    """Takes parameters that no result depends on from the source checkpoint; an encoder may lack some there, too."""
    checkpoint = module.weights.checkpoint
    if checkpoint is None:
        raise UnsupportedModelError("the module has no checkpoint any more", where=", ".join(names[:4]))
    values = {key: value for key, value in module.config.items() if key != "quantization_config"}
    same = values == plan.template.values
    original = plan.template.model if same else build_template(values, with_cache=False).model
    required = None if plan.template.source.is_decoder else ()
    mapping = map_checkpoint(
        original, checkpoint, quantization_config=module.config.get("quantization_config"), required=required
    )
    for name in names:
        expression = mapping.expressions.get(name)
        if expression is None:
            continue
        producer = Taken(expression, module.weights)
        shape, _ = module.weights.shape_dtype(expression)
        if shape != plan.template.specs[name].shape:
            raise UnsupportedModelError(
                f"the parameter {name}, which the result does not depend on, would have another shape", where=name
            )
        plan.producers[name] = producer
