"""Short text for tests of passes: functions of one block, compared by structure."""

from __future__ import annotations

import re

from moec.dialects.builtin import ModuleOp
from moec.ir import parse_module, structural_difference, verify
from moec.pipeline import PassManager, Pipeline, PipelineReport

_OPERATION = re.compile(r"((?:%\w+(?:, )?)+) = ([\w.]+)\((.*)\) -> (?:\((.*)\)|(\w+\[[^\]]*\]))")
_TYPE = re.compile(r"\b(f64|f32|f16|bf16|i64|i32|i1)\[([^\]]*)\]")
_ARGUMENT = re.compile(r"(\w+)=((?:\[[^\]]*\]|[^,\[]+))(?:, |$)")
_DECLARED = re.compile(r"(%\w+): (\w+\[[^\]]*\])")


def function(arguments: str, body: str) -> ModuleOp:
    """A module with `main(arguments)` from lines of aten operations, the last one a `return %a, %b`.

        %a = view.default(self=%x, size=[$batch, 24]) -> f32[batch, 24]

    `$batch` or `$(batch * 2)` is a size expression; arguments with a value are operands, the others attributes.
    """
    *lines, last = [line.strip() for line in body.strip().splitlines()]
    types = dict(_DECLARED.findall(arguments))
    text = [_operation(line, types) for line in lines]
    values = re.findall(r"%\w+", last)
    result = ", ".join(types[value] for value in values)
    inputs = ", ".join(kind for _, kind in _DECLARED.findall(arguments))
    whole = (
        f'"builtin.module"() ({{\n"func.func"() <{{function_type = ({inputs}) -> ({result}), sym_name = "main"}}> ({{\n'
        f"^bb0({arguments}):\n" + "\n".join(text) + f'\n"func.return"({", ".join(values)}) : ({result}) -> ()\n'
        "}) : () -> ()\n}) : () -> ()"
    )
    module = parse_module(_TYPE.sub(lambda match: f"!moec.tensor<[{match.group(2)}], {match.group(1)}>", whole))
    assert isinstance(module, ModuleOp)
    verify(module)
    return module


def _operation(line: str, types: dict[str, str]) -> str:
    match = _OPERATION.fullmatch(line)
    assert match is not None, line
    results, name, arguments, several, single = match.groups()
    operands, layout, attributes = [], [], []
    for key, value in _ARGUMENT.findall(arguments):
        if value.startswith("%"):
            operands.append(value)
            layout.append(f'"{key}"')
        else:
            attributes.append(f"{key} = " + re.sub(r"\$(?:\(([^)]*)\)|(\w+))", r"#moec.dim<\1\2>", value))
    if layout:
        attributes.append(f"operand_layout = [{', '.join(layout)}]")
    kinds = re.findall(r"\w+\[[^\]]*\]", several or single)
    types.update(zip(results.split(", "), kinds, strict=True))
    inputs = ", ".join(types[value] for value in operands)
    properties = f" <{{{', '.join(attributes)}}}>" if attributes else ""
    return f'{results} = "aten.{name}"({", ".join(operands)}){properties} : ({inputs}) -> ({", ".join(kinds)})'


def run(module: ModuleOp, pipeline: str) -> PipelineReport:
    """Runs a pipeline, verifying after each pass."""
    return PassManager(Pipeline.parse(pipeline)).run(module)


def assert_becomes(before: ModuleOp, pipeline: str, expected: ModuleOp) -> PipelineReport:
    """Runs the pipeline on `before` and compares by structure; a second run must change nothing."""
    report = run(before, pipeline)
    difference = structural_difference(before, expected)
    assert difference is None, difference
    run(before, pipeline)
    assert structural_difference(before, expected) is None
    return report
