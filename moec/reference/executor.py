"""Interprets the function `main` of a module on torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from moec.dialects.builtin import ModuleOp
from moec.errors import UsageError
from moec.ir import TensorType, Value

# These modules register their kernels.
from moec.reference import aten_kernel, large_weights, nn_kernels, quant_kernel, replica  # noqa: F401
from moec.reference import experts as _experts  # noqa: F401
from moec.reference import route as _route  # noqa: F401
from moec.reference.element_types import ElementTypes
from moec.reference.frame import ExpertsLowering, Frame, Observer, RunSettings, Steering
from moec.reference.plan import Step, plan_block
from moec.reference.symbols import bind_symbols
from moec.reference.weight_loader import WeightLoader
from moec.weights.context import WeightContext


class Executor:
    """Runs `main` of a module that does not change meanwhile.

        Executor(module.op, module.weights).run({"input_ids": ..., "attention_mask": ...})["logits"]

    Each weight is loaded where it is used and freed at once; each intermediate value is freed after its last use. Under
    torch's gradient mode the results are differentiable with respect to inputs and overrides.
    """

    def __init__(
        self,
        module: ModuleOp,
        weights: WeightContext | Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        experts: ExpertsLowering = ExpertsLowering.GROUPED,
        keep_weights: bool = False,
    ) -> None:
        """`weights` loads what weight expressions name, or is a mapping from those names to tensors in memory.

        `dtype` float64 computes everything that the IR calls f32 in float64. `keep_weights` loads each weight only
        once, for small models that run many times.
        Raises UsageError for another dtype and UnsupportedModelError for an operation that cannot be computed.
        """
        self.function = module.main
        context = weights if isinstance(weights, WeightContext) else WeightContext(in_memory=weights)
        types = ElementTypes(dtype)
        self._settings = RunSettings(types, WeightLoader(context, types, keep_weights), experts)
        self._plan = plan_block(self.function.body)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All operations of `main` but weights and the return, in order."""
        return self._plan.steps

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        overrides: Mapping[str, torch.Tensor] | None = None,
        observers: Sequence[Observer] = (),
        steering: Steering | None = None,
    ) -> dict[str, torch.Tensor]:
        """The results of `main` by name.

        `overrides`: tensors in place of weights, by weight name; gradients reach them.
        `observers` see every operation after it was computed, those inside experts too.
        `steering` changes which experts tokens choose.
        Raises UsageError for inputs that do not fit, VerificationError where the IR's types are wrong.
        """
        with self.session(inputs, overrides=overrides, observers=observers, steering=steering) as execution:
            execution.run(self.steps)
            return execution.results()

    @contextmanager
    def session(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        overrides: Mapping[str, torch.Tensor] | None = None,
        observers: Sequence[Observer] = (),
        steering: Steering | None = None,
    ) -> Iterator[Execution]:
        """A run in pieces; arguments as in `run`."""
        frame = self._begin(inputs)
        settings = frame.settings
        settings.observers, settings.steering = tuple(observers), steering
        self._check_overrides(overrides or {})
        settings.weights.overrides = overrides or {}
        default = torch.get_default_dtype()
        # what torch computes from integers alone takes the default type
        torch.set_default_dtype(settings.types.dtype)
        try:
            yield Execution(self, frame)
        finally:
            torch.set_default_dtype(default)
            settings.weights.overrides = {}

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Inside, weights stay in memory once they are loaded: for one layer that runs on many inputs."""
        loader = self._settings.weights
        before = loader.keep
        loader.keep = True
        try:
            yield
        finally:
            loader.keep = before
            if not before:
                loader.forget()

    def _begin(self, inputs: Mapping[str, torch.Tensor]) -> Frame:
        names = self.function.arg_names or tuple(f"argument{i}" for i in range(len(self.function.arguments)))
        unknown = sorted(set(inputs) - set(names))
        missing = [name for name in names if name not in inputs]
        if unknown or missing:
            problem = f"has no input {unknown[0]}" if unknown else f"needs the input {missing[0]}"
            raise UsageError(f"the model {problem}", hint=f"its inputs are {', '.join(names)}")
        kinds = []
        values: dict[Value, torch.Tensor] = {}
        for name, argument in zip(names, self.function.arguments, strict=True):
            kind = argument.type
            assert isinstance(kind, TensorType)
            kinds.append((name, kind, tuple(inputs[name].shape)))
            values[argument] = inputs[name].to(self._settings.types[kind.dtype])
        settings = RunSettings(self._settings.types, self._settings.weights, self._settings.experts)
        return Frame(settings, bind_symbols(kinds), values)

    def _check_overrides(self, overrides: Mapping[str, torch.Tensor]) -> None:
        if not overrides:
            return
        known = {op.attributes["weight_name"] for op in self.function.walk() if op.name == "moec.weight"}
        for name in overrides:
            if name not in known:
                raise UsageError(f"the module has no weight {name} to override")


@dataclass
class Execution:
    """One run in progress. `values` holds what later operations still need."""

    executor: Executor
    frame: Frame

    @property
    def values(self) -> dict[Value, torch.Tensor]:
        """Live values; they may be replaced between two calls of `run`."""
        return self.frame.values

    def run(self, steps: Sequence[Step]) -> None:
        """Computes operations, whose operands must have been computed; raises as `Executor.run`."""
        for step in steps:
            step.run(self.frame)

    def results(self) -> dict[str, torch.Tensor]:
        """The results of `main` by name, once all steps ran."""
        returned = self.executor.function.return_op.operands
        names = self.executor.function.result_names or tuple(f"result{i}" for i in range(len(returned)))
        return {name: self.frame.tensor(value) for name, value in zip(names, returned, strict=True)}
