"""Operations, values, blocks and regions: the mutable graph.

Operations of a block form a doubly linked list. A value knows its uses as an insertion-ordered dict, so that walking
and replacing uses is deterministic. A region holds one block: control flow is structured, as in all dialects here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from moec.ir.location import UNKNOWN, Location
from moec.ir.types import Type


class Value:
    """An SSA value. `uses` maps (user, operand index) to None."""

    __slots__ = ("type", "uses")

    def __init__(self, value_type: Type) -> None:
        self.type = value_type
        self.uses: dict[tuple[Operation, int], None] = {}

    @property
    def users(self) -> list[Operation]:
        """Distinct operations that read this value, in order of first use."""
        return list(dict.fromkeys(user for user, _ in self.uses))

    @property
    def has_one_use(self) -> bool:
        return len(self.uses) == 1

    @property
    def defining_op(self) -> Operation | None:
        """The operation whose result this is; None for a block argument."""
        return None

    def replace_all_uses_with(self, other: Value) -> None:
        """Makes every user read `other`."""
        if other is self:
            return
        for user, index in self.uses:
            user._operands[index] = other
            other.uses[user, index] = None
        self.uses = {}


class OpResult(Value):
    """Result number `index` of the operation `owner`."""

    __slots__ = ("index", "owner")

    def __init__(self, value_type: Type, owner: Operation, index: int) -> None:
        super().__init__(value_type)
        self.owner = owner
        self.index = index

    @property
    def defining_op(self) -> Operation:
        return self.owner

    def __repr__(self) -> str:
        return f"<result {self.index} of {self.owner.name}: {self.type}>"


class BlockArgument(Value):
    """Argument number `index` of `block`."""

    __slots__ = ("block", "index")

    def __init__(self, value_type: Type, block: Block, index: int) -> None:
        super().__init__(value_type)
        self.block = block
        self.index = index

    def __repr__(self) -> str:
        return f"<argument {self.index}: {self.type}>"


class Operation:
    """One operation. Typed operations derive from `definition.Op`; this class alone stands for an unregistered one.

    `attributes` holds Python values as `attributes.py` lists them. Equality and hash are by identity.
    """

    __slots__ = ("_operands", "attributes", "location", "name", "next", "parent", "prev", "regions", "results")

    # filled by definition.Op: operation name -> typed class; and for open dialects (aten), dialect name -> class of
    # all its operations
    registry: ClassVar[dict[str, type[Operation]]] = {}
    open_dialects: ClassVar[dict[str, type[Operation]]] = {}
    # attributes that the text puts into `<{...}>`; None for all. MLIR drops those that its own operations do not know,
    # so the others stand in `{...}` behind the regions.
    property_names: ClassVar[frozenset[str] | None] = None
    # regions of this operation read no values from outside of them
    isolated: ClassVar[bool] = False
    pure: ClassVar[bool] = False
    terminator: ClassVar[bool] = False

    def __init__(
        self,
        name: str,
        operands: Sequence[Value] = (),
        result_types: Sequence[Type] = (),
        attributes: Mapping[str, Any] | None = None,
        regions: Sequence[Region] = (),
        location: Location = UNKNOWN,
    ) -> None:
        self._fill(name, operands, result_types, attributes, regions, location)

    @staticmethod
    def create(
        name: str,
        operands: Sequence[Value] = (),
        result_types: Sequence[Type] = (),
        attributes: Mapping[str, Any] | None = None,
        regions: Sequence[Region] = (),
        location: Location = UNKNOWN,
    ) -> Operation:
        """An operation of the class that is registered for `name`, without inference or checks."""
        kind = Operation.registry.get(name) or Operation.open_dialects.get(name.partition(".")[0], Operation)
        op = kind.__new__(kind)
        op._fill(name, operands, result_types, attributes, regions, location)
        return op

    def _fill(
        self,
        name: str,
        operands: Sequence[Value],
        result_types: Sequence[Type],
        attributes: Mapping[str, Any] | None,
        regions: Sequence[Region],
        location: Location,
    ) -> None:
        self.name = name
        self._operands = list(operands)
        for index, value in enumerate(operands):
            value.uses[self, index] = None
        self.results = tuple([OpResult(kind, self, index) for index, kind in enumerate(result_types)])
        self.attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self.regions = tuple(regions)
        for region in self.regions:
            region.parent = self
        self.location = location
        self.parent: Block | None = None
        self.prev: Operation | None = None
        self.next: Operation | None = None

    # -- operands --------------------

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(self._operands)

    @property
    def operand_count(self) -> int:
        return len(self._operands)

    def set_operand(self, index: int, value: Value) -> None:
        old = self._operands[index]
        if old is not value:
            del old.uses[self, index]
            self._operands[index] = value
            value.uses[self, index] = None

    def set_operands(self, values: Sequence[Value]) -> None:
        """Replaces the whole operand list; its length may change."""
        self._drop_operands()
        self._operands = list(values)
        for index, value in enumerate(values):
            value.uses[self, index] = None

    def _drop_operands(self) -> None:
        for index, value in enumerate(self._operands):
            del value.uses[self, index]
        self._operands = []

    @property
    def result(self) -> OpResult:
        """The only result; raises ValueError if there is not exactly one."""
        if len(self.results) != 1:
            raise ValueError(f"{self.name} has {len(self.results)} results, not one")
        return self.results[0]

    @property
    def has_uses(self) -> bool:
        return any(result.uses for result in self.results)

    # -- position --------------------

    @property
    def parent_op(self) -> Operation | None:
        """The operation whose region holds this one."""
        return self.parent.parent.parent if self.parent is not None and self.parent.parent is not None else None

    def detach(self) -> None:
        """Takes the operation out of its block; its uses stay."""
        block = self.parent
        if block is None:
            return
        if self.prev is None:
            block.first = self.next
        else:
            self.prev.next = self.next
        if self.next is None:
            block.last = self.prev
        else:
            self.next.prev = self.prev
        self.parent = self.prev = self.next = None

    def insert_before(self, anchor: Operation) -> None:
        """Puts this detached operation before `anchor`."""
        if anchor.parent is None:
            raise ValueError(f"{anchor.name} is in no block")
        self.parent, self.prev, self.next = anchor.parent, anchor.prev, anchor
        if anchor.prev is None:
            anchor.parent.first = self
        else:
            anchor.prev.next = self
        anchor.prev = self

    def insert_after(self, anchor: Operation) -> None:
        """Puts this detached operation behind `anchor`."""
        if anchor.next is not None:
            self.insert_before(anchor.next)
        elif anchor.parent is not None:
            anchor.parent.append(self)
        else:
            raise ValueError(f"{anchor.name} is in no block")

    def erase(self) -> None:
        """Removes the operation and everything in its regions. Its results must be unused."""
        if self.has_uses:
            raise ValueError(f"{self.name} still has uses")
        self.detach()
        self.drop_all_references()

    def drop_all_references(self) -> None:
        """Stops using any value, in nested regions too."""
        self._drop_operands()
        for region in self.regions:
            for op in region.block:
                op.drop_all_references()

    def replace_with(self, values: Sequence[Value]) -> None:
        """Makes users of the results read `values`, then erases the operation."""
        if len(values) != len(self.results):
            raise ValueError(f"{self.name} has {len(self.results)} results, replaced by {len(values)} values")
        for result, value in zip(self.results, values, strict=True):
            result.replace_all_uses_with(value)
        self.erase()

    # -- traversal and copies --------------------

    def walk(self) -> Iterator[Operation]:
        """This operation, then all nested ones, in order. The current operation may be erased while walking."""
        yield self
        for region in self.regions:
            for op in region.block:
                yield from op.walk()

    def clone(self, mapping: dict[Value, Value] | None = None) -> Operation:
        """A detached deep copy. `mapping` translates outer values and is extended by every value defined inside."""
        mapping = {} if mapping is None else mapping
        copy = Operation.create(
            self.name,
            [mapping.get(value, value) for value in self._operands],
            [result.type for result in self.results],
            self.attributes,
            [],
            self.location,
        )
        mapping.update(zip(self.results, copy.results, strict=True))
        regions = []
        for region in self.regions:
            block = Block([argument.type for argument in region.block.arguments])
            mapping.update(zip(region.block.arguments, block.arguments, strict=True))
            for op in region.block:
                block.append(op.clone(mapping))
            regions.append(Region(block))
            regions[-1].parent = copy
        copy.regions = tuple(regions)
        return copy

    def verify_op(self) -> None:
        """Checks what this operation alone requires; raises VerifyError. Typed operations override it."""

    def __repr__(self) -> str:
        from moec.ir.printer import message_text

        return f"<{message_text(self)}>"


class Block:
    """A list of operations with arguments."""

    __slots__ = ("arguments", "first", "last", "parent")

    def __init__(self, argument_types: Sequence[Type] = (), ops: Sequence[Operation] = ()) -> None:
        self.arguments: list[BlockArgument] = [BlockArgument(kind, self, i) for i, kind in enumerate(argument_types)]
        self.first: Operation | None = None
        self.last: Operation | None = None
        self.parent: Region | None = None
        for op in ops:
            self.append(op)

    def __iter__(self) -> Iterator[Operation]:
        op = self.first
        while op is not None:
            following = op.next
            yield op
            op = following

    def __reversed__(self) -> Iterator[Operation]:
        op = self.last
        while op is not None:
            preceding = op.prev
            yield op
            op = preceding

    def append(self, op: Operation) -> None:
        """Puts a detached operation at the end."""
        op.parent, op.prev, op.next = self, self.last, None
        if self.last is None:
            self.first = op
        else:
            self.last.next = op
        self.last = op

    def add_argument(self, value_type: Type) -> BlockArgument:
        argument = BlockArgument(value_type, self, len(self.arguments))
        self.arguments.append(argument)
        return argument

    def erase_argument(self, index: int) -> None:
        """Removes an unused argument."""
        if self.arguments[index].uses:
            raise ValueError(f"argument {index} still has uses")
        del self.arguments[index]
        for position, argument in enumerate(self.arguments):
            argument.index = position

    @property
    def terminator(self) -> Operation:
        """The last operation; raises ValueError for an empty block."""
        if self.last is None:
            raise ValueError("the block is empty")
        return self.last


class Region:
    """Holds one block."""

    __slots__ = ("block", "parent")

    def __init__(self, block: Block | None = None) -> None:
        self.block = Block() if block is None else block
        self.block.parent = self
        self.parent: Operation | None = None
