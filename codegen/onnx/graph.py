"""A small builder over onnx_ir: deterministic names, constants stored once, weights that load when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from moec.codegen.onnx.external_data import StoredTensor
from moec.ir.types import DType

MICROSOFT = "com.microsoft"

ONNX_DTYPES = {
    DType.F64: ir.DataType.DOUBLE,
    DType.F32: ir.DataType.FLOAT,
    DType.F16: ir.DataType.FLOAT16,
    DType.BF16: ir.DataType.BFLOAT16,
    DType.F8E4M3FN: ir.DataType.FLOAT8E4M3FN,
    DType.F8E5M2: ir.DataType.FLOAT8E5M2,
    DType.I64: ir.DataType.INT64,
    DType.I32: ir.DataType.INT32,
    DType.I16: ir.DataType.INT16,
    DType.I8: ir.DataType.INT8,
    DType.U8: ir.DataType.UINT8,
    DType.I1: ir.DataType.BOOL,
}


@dataclass
class _Shared:
    """What the main graph and its subgraphs have in common: one name space and one set of initialisers."""

    names: dict[str, int] = field(default_factory=dict)
    constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)
    initializers: list[ir.Value] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    stored: list[StoredTensor] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    scope: list[str] = field(default_factory=list)
    expert: tuple[int, ...] | None = None


class GraphBuilder:
    """Builds one graph. `subgraph()` gives a builder for a control-flow body, which may read values of this graph."""

    def __init__(self, opset: int, *, constants_as_nodes: bool = False, parent: GraphBuilder | None = None) -> None:
        """`constants_as_nodes` is for function bodies, which cannot have initialisers."""
        self.opset = opset
        self.constants_as_nodes = constants_as_nodes
        self._outermost: GraphBuilder = self if parent is None else parent._outermost
        self._shared: _Shared = _Shared() if parent is None else parent._shared
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._memo: dict[tuple[Any, ...], tuple[ir.Value, ...]] = {}

    # names

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names made inside start with `name/`."""
        self._shared.scope.append(name)
        try:
            yield
        finally:
            self._shared.scope.pop()

    @contextmanager
    def expert(self, *place: int) -> Iterator[None]:
        """Weights that are first used inside belong to the expert at this place: layer, class, number in the class."""
        before = self._shared.expert
        self._shared.expert = place
        try:
            yield
        finally:
            self._shared.expert = before

    def scope_of(self, name: str) -> AbstractContextManager[None]:
        """The scope of a module path; none for an operation of unknown origin."""
        return self.scope(name) if name and not self._shared.scope else nullcontext()

    def unique(self, base: str) -> str:
        """`scope/base`, numbered when it is taken."""
        name = "/".join([*self._shared.scope, base])
        count = self._shared.names.get(name, 0)
        self._shared.names[name] = count + 1
        return f"{name}_{count}" if count else name

    # values

    def input(self, name: str, dtype: DType | ir.DataType | None, shape: Sequence[int | str] | None) -> ir.Value:
        """A graph input; `shape` may name symbolic sizes, None leaves the rank open."""
        value = _typed(name, dtype, shape)
        self.inputs.append(value)
        self._shared.names[name] = 1
        return value

    def output(
        self, value: ir.Value, name: str, dtype: DType | ir.DataType | None, shape: Sequence[int | str] | None
    ) -> None:
        """Declares `value` as the graph output `name`."""
        producer = value.producer()
        taken = value in self.outputs or producer is None or producer not in self._owned()
        if taken:
            value = self.op("Identity", value)
        value.name = name
        typed = _typed(name, dtype, shape)
        value.type, value.shape = typed.type, typed.shape
        self.outputs.append(value)

    def _owned(self) -> set[ir.Node]:
        return set(self.nodes)

    def constant(self, array: np.ndarray[Any, Any] | np.generic) -> ir.Value:
        """A small constant; equal ones are stored once."""
        data = np.asarray(array)
        key = (data.dtype.str, data.shape, data.tobytes())
        found = self._shared.constants.get(key)
        if found is None:
            if self.constants_as_nodes:
                # visible to every body, since the node that owns a body is made after the body
                found = self._outermost.op("Constant", value=ir.tensor(data))
            else:
                # numbered apart from the scope: a constant belongs to whoever uses it
                name = f"constant_{len(self._shared.constants)}"
                found = ir.Value(
                    name=name,
                    type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
                    shape=ir.Shape(data.shape),
                    const_value=ir.tensor(data, name=name),
                )
                self._shared.initializers.append(found)
            self._shared.constants[key] = found
        return found

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant, as shapes and axes are given."""
        return self.constant(np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        """A scalar int64 constant."""
        return self.constant(np.array(value, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar float32 constant."""
        return self.constant(np.array(value, np.float32))

    def weight(self, key: str, tensor: StoredTensor) -> ir.Value:
        """An initialiser whose data goes to the external file; the same key gives the same value."""
        if self._outermost is not self:
            return self._outermost.weight(key, tensor)
        key = f"{tensor.dtype.value} {key}"
        found = self._shared.weights.get(key)
        if found is None:
            taken = self._shared.names.get(tensor.name, 0)
            self._shared.names[tensor.name] = taken + 1
            if taken:
                tensor = replace(tensor, name=f"{tensor.name}_{taken}")
            found = ir.Value(
                name=tensor.name, type=ir.TensorType(ONNX_DTYPES[tensor.dtype]), shape=ir.Shape(tensor.shape)
            )
            self._shared.weights[key] = found
            self._shared.stored.append(replace(tensor, expert=tensor.expert or self._shared.expert))
        return found

    # nodes

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one result. Attributes that are None are left out."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """One node with several results. A node equal to an earlier one of the same graph is not made again."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = {key: value for key, value in attributes.items() if value is not None}
        key = _memo_key(op_type, domain, inputs, outputs, given)
        if key is not None and key in self._memo:
            return self._memo[key]
        name = self.unique(op_type)
        values = [ir.Value(name=f"{name}:{index}") for index in range(outputs)]
        node = ir.node(op_type, inputs, given, domain=domain, outputs=values, name=name)
        self.nodes.append(node)
        self._shared.domains.add(domain)
        if key is not None:
            self._memo[key] = tuple(values)
        return tuple(values)

    def subgraph(self) -> GraphBuilder:
        """A builder for a body; constants and weights made in it belong to the outermost graph."""
        return GraphBuilder(self.opset, constants_as_nodes=self.constants_as_nodes, parent=self)

    def to_graph(self, name: str) -> ir.Graph:
        """The body of a control-flow node or function."""
        opsets = {domain: 1 if domain else self.opset for domain in sorted({"", *self.domains})}
        return ir.Graph(self.inputs, self.outputs, nodes=self.nodes, name=name, opset_imports=opsets)

    # arithmetic on shapes

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, as a one-element int64 tensor."""
        return self.op("Shape", value, start=axis, end=axis + 1 if axis != -1 else None)

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.Value]) -> ir.Value:
        """Reshape to sizes that are numbers (0 copies the input's, -1 is inferred) or one-element tensors."""
        return self.op("Reshape", value, self.shape_vector(shape))

    def shape_vector(self, shape: Sequence[int | ir.Value]) -> ir.Value:
        """The sizes as one int64 vector."""
        if all(isinstance(size, int) for size in shape):
            return self.ints(*(size for size in shape if isinstance(size, int)))
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in shape:
            if isinstance(size, int):
                run.append(size)
                continue
            if run:
                parts.append(self.ints(*run))
                run = []
            parts.append(size)
        if run:
            parts.append(self.ints(*run))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def cast(self, value: ir.Value, dtype: DType) -> ir.Value:
        return self.op("Cast", value, to=int(ONNX_DTYPES[dtype]))

    # result

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Weights in the order of first use."""
        return tuple(self._shared.stored)

    @property
    def weight_values(self) -> tuple[ir.Value, ...]:
        """The values of `stored`, in the same order."""
        return tuple(self._shared.weights.values())

    @property
    def initializers(self) -> tuple[ir.Value, ...]:
        """Constants, then weights."""
        return (*self._shared.initializers, *self._shared.weights.values())

    @property
    def domains(self) -> frozenset[str]:
        """Operator domains in use, those of subgraphs included."""
        return frozenset(self._shared.domains)


def _typed(name: str, dtype: DType | ir.DataType | None, shape: Sequence[int | str] | None) -> ir.Value:
    onnx_dtype = ONNX_DTYPES[dtype] if isinstance(dtype, DType) else dtype
    return ir.Value(
        name=name,
        type=None if onnx_dtype is None else ir.TensorType(onnx_dtype),
        shape=None if shape is None else ir.Shape(list(shape)),
    )


def _memo_key(
    op_type: str, domain: str, inputs: Sequence[ir.Value | None], outputs: int, attributes: dict[str, Any]
) -> tuple[Any, ...] | None:
    """What makes two nodes equal; None where an attribute is a graph or tensor."""
    parts: list[tuple[str, Any]] = []
    for name in sorted(attributes):
        value = attributes[name]
        if isinstance(value, list):
            value = tuple(value)
        if not isinstance(value, int | float | str | tuple):
            return None
        parts.append((name, value))
    # identities, since every value lives as long as the builder that holds its node
    return op_type, domain, tuple(None if value is None else id(value) for value in inputs), outputs, tuple(parts)
