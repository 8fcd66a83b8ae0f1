"""One place to ask for weights: a checkpoint, the store of computed tensors and tensors in memory, by expression."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import torch

from moec.errors import UsageError
from moec.weights.checkpoint import Checkpoint, row_regions
from moec.weights.evaluation import Evaluator, expression_digest, full_region
from moec.weights.expression import Cast, Expression, Reference, Stored
from moec.weights.expression_parser import parse_expression
from moec.weights.safetensors_file import Region, TensorLocation
from moec.weights.store import WeightStore
from moec.weights.tensor_spec import TensorSpec, content_digest


class WeightContext:
    """Loads weight expressions. Names are looked up among the tensors in memory and in the checkpoint.

    Nothing is kept: each call reads what it needs and returns a new tensor that the caller owns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        store: WeightStore | None = None,
        in_memory: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """`in_memory`: for example a module's state dict. Raises UsageError when a name is also in the checkpoint."""
        self.checkpoint = checkpoint
        self.store = store
        self._in_memory = dict(in_memory or {})
        self._evaluator = Evaluator(self)
        for name in self._in_memory:
            if checkpoint is not None and name in checkpoint:
                raise UsageError(
                    f"the tensor {name} is both in memory and in the checkpoint",
                    where=str(checkpoint.folder),
                    hint="give the tensor in memory another name",
                )

    def load(self, expression: Expression | str, index: int | slice | None = None) -> torch.Tensor:
        """The value of `expression`, or of `value[index]` along dimension 0, as a new dense tensor.

        Only what `index` needs is read: one expert of a stack is one expert's bytes.
        Raises UsageError for malformed expressions, unknown tensors and indices out of range.
        """
        expression = self._expression(expression)
        spec = self._evaluator.infer(expression)
        region = full_region(spec)
        if index is None:
            return self._evaluator.evaluate(expression, region)
        if not region:
            raise UsageError("a tensor without dimensions has no index", where=str(expression)[:300])
        if isinstance(index, int):
            rows = range(region[0][index], region[0][index] + 1) if -len(region[0]) <= index < len(region[0]) else None
        else:
            rows = region[0][index]
        if rows is None or rows.step < 1:
            raise UsageError(
                f"the index {index} does not select rows of {spec}",
                where=str(expression)[:300],
                hint="use an index in range, or a slice with a positive step",
            )
        value = self._evaluator.evaluate(expression, (rows, *region[1:]))
        return value[0] if isinstance(index, int) else value

    def unrounded(self, expression: Expression | str) -> Expression:
        """What stands for `expression` in float64 arithmetic: without an outermost cast from float64.

        Passes that multiply weights store the products in float64, so that float64 runs see no rounding of theirs.
        """
        expression = self._expression(expression)
        if isinstance(expression, Cast) and self.shape_dtype(expression.operand)[1] is torch.float64:
            return expression.operand
        return expression

    def chunks(self, expression: Expression | str, limit: int = 64 << 20) -> Iterator[torch.Tensor]:
        """The value of `expression` in parts along dimension 0, each of at most `limit` bytes (or one row).

        The parts' bytes in order are the bytes of the whole. Raises as `load` does.
        """
        expression = self._expression(expression)
        for region in row_regions(self._evaluator.infer(expression), limit):
            yield self._evaluator.evaluate(expression, region)

    def shape_dtype(self, expression: Expression | str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and element type, from headers alone. Raises as `load` does."""
        spec = self._evaluator.infer(self._expression(expression))
        return spec.shape, spec.dtype

    def digest(self, expression: Expression | str) -> str:
        """SHA-256 of the expression and of the contents it is made from, whatever their names and files."""
        return expression_digest(self._expression(expression), self)

    def location(self, expression: Expression | str) -> TensorLocation | None:
        """File and offset that hold exactly the bytes of `expression`, or None when it has to be computed."""
        expression = self._expression(expression)
        while isinstance(expression, Cast) and self.shape_dtype(expression.operand)[1] == expression.dtype:
            expression = expression.operand
        if isinstance(expression, Stored) and self.store is not None:
            return self.store.location(expression)
        if isinstance(expression, Reference) and expression.name not in self._in_memory and self.checkpoint is not None:
            return self.checkpoint.location(expression.name)
        return None

    def leaf_spec(self, leaf: Reference | Stored) -> TensorSpec:
        """Shape and element type of one tensor. Raises UsageError when there is none."""
        if isinstance(leaf, Stored):
            return self._require_store(leaf).location(leaf).spec
        tensor = self._in_memory.get(leaf.name)
        if tensor is not None:
            return TensorSpec(tuple(tensor.shape), tensor.dtype)
        return self._require_checkpoint(leaf).spec(leaf.name)

    def leaf_part(self, leaf: Reference | Stored, region: Region, out: torch.Tensor | None = None) -> torch.Tensor:
        """The part `region` of one tensor, copied into `out` or a new tensor. Raises UsageError when there is none."""
        if isinstance(leaf, Stored):
            return self._require_store(leaf).read(leaf, region, out)
        tensor = self._in_memory.get(leaf.name)
        if tensor is None:
            return self._require_checkpoint(leaf).read(leaf.name, region, out)
        window = tensor.detach()[tuple(slice(part.start, part.stop, part.step) for part in region)]
        return window.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(window)

    def leaf_digest(self, leaf: Reference | Stored) -> str:
        """Content digest of one tensor. Raises UsageError when there is none."""
        if isinstance(leaf, Stored):
            return leaf.digest
        tensor = self._in_memory.get(leaf.name)
        if tensor is None:
            return self._require_checkpoint(leaf).digest(leaf.name)
        return content_digest(tensor)

    @staticmethod
    def _expression(expression: Expression | str) -> Expression:
        return parse_expression(expression) if isinstance(expression, str) else expression

    def _require_store(self, leaf: Stored) -> WeightStore:
        if self.store is None:
            raise UsageError(
                f"the stored tensor {leaf.digest} is needed, but there is no store", hint="give the store's folder"
            )
        return self.store

    def _require_checkpoint(self, leaf: Reference) -> Checkpoint:
        if self.checkpoint is None:
            near = difflib.get_close_matches(leaf.name, self._in_memory, n=1)
            raise UsageError(
                f"there is no tensor {leaf.name} in memory, and no checkpoint is open",
                hint=f"did you mean {near[0]}" if near else "open the checkpoint that the weights come from",
            )
        return self.checkpoint
