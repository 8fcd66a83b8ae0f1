"""Pipeline text, options, the pass manager and its instruments."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import MoecError, UnsupportedModelError
from moec.ir import Operation, VerifyError, parse_module, print_operation
from moec.pipeline import (
    Claim,
    Instrument,
    InvalidResultError,
    IRPrinting,
    Pass,
    PassContext,
    PassExecution,
    PassFailedError,
    PassManager,
    Pipeline,
    PipelineError,
    Statistic,
    Timing,
    option,
    register_pass,
)
from moec.pipeline.options import build_pass, pass_options, pass_text
from moec.pipeline.reproducer import Reproducer, read_reproducer
from moec.pipeline.spec import NestedSpec, PassSpec, parse_pipeline_text, pipeline_text
from tests.filecheck_plugin import run_moec
from tests.ir.build import moe_module
from tests.passes.text import function

X = "%x: f32[4]"
CHAIN = "%a = neg.default(self=%x) -> f32[4]\nreturn %a"


class Color(Enum):
    RED = "red"
    GREEN = "green"


@register_pass("paint")
@dataclass(frozen=True)
class Paint(Pass):
    """Has an option of each type.

    More about it.
    """

    claim: ClassVar[Claim] = Claim.LOSSY
    painted = Statistic("operations painted")
    color: Color = option("a member of an enum", Color.RED)
    max_layers: int = option("a number", 3)
    thickness: float = option("a real number", 0.5)
    dry: bool = option("a flag", False)
    layers: tuple[int, ...] = option("a list", ())
    mode: Literal["fast", "slow"] = option("one of two", "fast")
    name: str = option("a text", "")
    limit: int | None = option("a number or none", None)

    def __post_init__(self) -> None:
        if self.max_layers < 0:
            raise ValueError("max-layers must not be negative")

    def run(self, op: Operation, context: PassContext) -> None:
        for nested in op.walk():
            if nested.name == "aten.neg.default":
                nested.attributes["operand_layout"] = ("self",)
                context.count(self.painted)


@register_pass("needs-number")
@dataclass(frozen=True)
class NeedsNumber(Pass):
    """Has an option without a default, and runs on the module only."""

    anchor: ClassVar[str] = "builtin.module"
    number: int = option("how many")

    def run(self, op: Operation, context: PassContext) -> None:
        context.remark(op, f"{self.number} with seed {context.seed}")


@register_pass("misbehave")
@dataclass(frozen=True)
class Misbehave(Pass):
    """Fails in the way that is asked for."""

    how: Literal["raise", "refuse", "break"] = option("in which way", "raise")

    def run(self, op: Operation, context: PassContext) -> None:
        if self.how == "raise":
            raise IndexError("row 7")
        if self.how == "refuse":
            raise UnsupportedModelError("no such layer", where="layer 3", hint="take another")
        next(nested for nested in op.walk() if nested.name.startswith("aten.")).attributes["nonsense"] = 1


# -- text --------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("a", "a"),
        (" a , b ", "a,b"),
        ("a{x=1 y}", "a{x=1 y}"),
        ("a{x=1, y=2}", "a{x=1 y=2}"),
        ("a{max_layers=1}", "a{max-layers=1}"),
        ("a{x='two words'}", 'a{x="two words"}'),
        ('a{x="it\'s"}', 'a{x="it\'s"}'),
        ("a{x={b c}}", 'a{x="b c"}'),
        ("a{x=1,2,3}", "a{x=1,2,3}"),
        ("a{x=}", 'a{x=""}'),
        ("func.func(a,b)", "func.func(a,b)"),
        ("builtin.func(a)", "func.func(a)"),
        ("builtin.module(a,func.func(b)),c", "a,func.func(b),c"),
        ("dist:a{x=1}", "dist:a{x=1}"),
    ],
)
def test_text(text: str, canonical: str) -> None:
    assert pipeline_text(parse_pipeline_text(text)) == canonical
    assert pipeline_text(parse_pipeline_text(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,", "expected the name of a pass"),
        (",a", "expected the name of a pass, found ','"),
        ("a b", "unexpected 'b'"),
        ("a{", "missing '}'"),
        ("a{x=1", "missing '}'"),
        ("a{x='1}", "missing closing '"),
        ("a{x={b}", "missing '}'"),
        ("a{=1}", "expected an option or '}'"),
        ("a{x=1 x=2}", "option x is given twice"),
        ("func.func(a", "missing ')'"),
        ("func.func(a))", "unexpected ')'"),
        ("module(a)", "passes cannot be nested in module"),
        ("func.func(builtin.module(a))", "passes cannot be nested in builtin.module"),
        ("func.func(" * 100 + ")" * 100, "nested deeper"),
        ("päss", "unexpected 'ä'"),
    ],
)
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(message)) as caught:
        parse_pipeline_text(text)
    assert caught.value.exit_code == 2 and "column" in caught.value.where


names = st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True)
values = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\"'\x7f"), max_size=8)
specs = st.builds(
    PassSpec,
    names,
    st.dictionaries(names, st.none() | values, max_size=3).map(lambda found: tuple(found.items())),
)

nested_specs = st.builds(NestedSpec, st.just("func.func"), st.lists(specs, max_size=2).map(tuple))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(specs | st.builds(NestedSpec, st.just("func.func"), st.lists(specs, max_size=2).map(tuple)), max_size=3)
)
def test_text_reads_back(items: list[PassSpec | NestedSpec]) -> None:
    text = pipeline_text(tuple(items))
    assert parse_pipeline_text(text) == tuple(items), text


# -- options --------------------


def build(text: str) -> Pass:
    [item] = parse_pipeline_text(text)
    assert isinstance(item, PassSpec)
    return build_pass(Paint, item)


def test_options_are_typed_by_their_fields() -> None:
    text = "paint{color=green max-layers=7 thickness=1e-3 dry layers=1,2 mode=slow name='a b' limit=4}"
    assert build(text) == Paint(Color.GREEN, 7, 1e-3, True, (1, 2), "slow", "a b", 4)
    assert build("paint") == Paint()
    assert build("paint{dry=false limit=none layers=}") == Paint()
    rendered = pass_text(build(text))
    assert rendered == 'paint{color=green max-layers=7 thickness=0.001 dry layers=1,2 mode=slow name="a b" limit=4}'
    assert build(rendered) == build(text)


def test_options_describe_themselves() -> None:
    kinds = {found.name: found.kind_text for found in pass_options(Paint)}
    assert kinds == {
        "color": "red|green",
        "max-layers": "int",
        "thickness": "float",
        "dry": "bool",
        "layers": "list of int",
        "mode": "fast|slow",
        "name": "str",
        "limit": "int or none",
    }
    assert Paint.summary() == "Has an option of each type."
    assert [statistic.name for statistic in Paint.statistic_list()] == ["painted"]
    assert dataclasses.is_dataclass(Paint) and Paint.description().endswith("More about it.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paint{colour=red}", "has no option 'colour'.*did you mean 'color'"),
        ("paint{zzz}", "has no option 'zzz'.*its options are color"),
        ("paint{color=gren}", "'gren' is no red|green.*did you mean 'green'"),
        ("paint{max-layers=many}", "'many' is no int for the option max-layers"),
        ("paint{max-layers}", "option max-layers needs a value"),
        ("paint{max-layers=-1}", "max-layers must not be negative"),
        ("paint{dry=maybe}", "'maybe' is no bool.*write true or false"),
        ("paint{layers=1,x}", "'1,x' is no list of int"),
        ("needs-number", "needs the option number.*how many"),
        ("func.func(needs-number{number=1})", "runs on the whole module, not on func.func"),
        ("canonicalise", "there is no pass 'canonicalise'.*did you mean 'canonicalize'"),
        ("zzz", "there is no pass 'zzz'.*the passes are .*cse"),
    ],
)
def test_wrong_pass_or_option(text: str, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(text)
    assert caught.value.exit_code == 2
    assert re.search(message.replace("|", r"\|"), str(caught.value)), str(caught.value)


# -- running --------------------


def test_passes_run_on_the_module_or_on_each_function() -> None:
    module = function(X, CHAIN)
    module.body.append(module.main.clone())
    list(module.functions())[1].sym_name = "other"
    report = PassManager(Pipeline.parse("paint,func.func(paint{dry}),needs-number{number=2}")).run(module, seed=5)
    assert [(record.text, record.target, record.statistics) for record in report.records] == [
        ("paint", "builtin.module", {"painted": 2}),
        ("paint{dry}", "func.func @main", {"painted": 1}),
        ("paint{dry}", "func.func @other", {"painted": 1}),
        ("needs-number{number=2}", "builtin.module", {}),
    ]
    assert report.records[0].claim == "lossy"
    assert "2 with seed 5" in report.explanation_text()
    assert "         2  painted" in report.statistics_text()


def test_observers_see_each_run_and_failures() -> None:
    seen: list[str] = []

    class Watch(Instrument):
        def before_pass(self, execution: PassExecution) -> None:
            seen.append(f"before {execution.index} {execution.text} {execution.claim.value}")

        def after_pass(self, execution: PassExecution) -> None:
            assert execution.seconds > 0
            seen.append(f"after {execution.pass_name} on {execution.target}")

        def after_failure(self, execution: PassExecution, error: Exception) -> None:
            seen.append(f"failed {execution.pass_name} {type(error).__name__}")

    with pytest.raises(PassFailedError):
        PassManager(Pipeline.parse("dce,misbehave"), observers=[Watch()]).run(function(X, CHAIN))
    assert seen == [
        "before 0 dce exact",
        "after dce on builtin.module",
        "before 1 misbehave exact",
        "failed misbehave IndexError",
    ]


def test_what_an_observer_raises_ends_the_run() -> None:
    class Ledger(Instrument):
        def after_pass(self, execution: PassExecution) -> None:
            raise MoecError(f"{execution.pass_name} does not preserve the function")

    with pytest.raises(MoecError, match="dce does not preserve the function"):
        PassManager(Pipeline.parse("dce"), observers=[Ledger()]).run(function(X, CHAIN))


@pytest.mark.parametrize(
    ("how", "kind", "code", "message"),
    [
        ("raise", PassFailedError, 1, "pass misbehave failed with IndexError: row 7"),
        ("refuse", UnsupportedModelError, 3, "pass misbehave: no such layer"),
        ("break", InvalidResultError, 4, "pass misbehave leaves invalid IR: aten.neg.default has no attribute"),
    ],
)
def test_failures(how: str, kind: type[MoecError], code: int, message: str) -> None:
    with pytest.raises(kind) as caught:
        PassManager(Pipeline.of(Misbehave(how))).run(function(X, CHAIN))  # type: ignore[arg-type]
    assert caught.value.exit_code == code and message in str(caught.value)
    if how == "refuse":
        assert caught.value.where == "layer 3" and caught.value.hint == "take another"


def test_invalid_input_is_no_fault_of_a_pass() -> None:
    module = function(X, CHAIN)
    PassManager(Pipeline.of(Misbehave("break")), verify_each=False).run(module)
    with pytest.raises(VerifyError) as caught:
        PassManager(Pipeline.parse("dce")).run(module)
    assert caught.value.exit_code == 2 and "pass" not in caught.value.message


def test_printing_before_after_and_on_change() -> None:
    def dumps(**options: object) -> list[str]:
        written: list[str] = []
        printing = IRPrinting(written.append, **options)  # type: ignore[arg-type]
        PassManager(Pipeline.parse("dce,func.func(cse)"), observers=[printing]).run(
            function(X, "%d = abs.default(self=%x) -> f32[4]\n" + CHAIN)
        )
        return [text.partition("\n")[0] for text in written]

    head = "// -----// IR Dump {} ({}) //----- //"
    assert dumps(before=frozenset({"*"}), after=frozenset({"cse"})) == [
        head.format("Before dce", "builtin.module"),
        head.format("Before cse", "func.func @main"),
        head.format("After cse", "func.func @main"),
    ]
    assert dumps(only_changed=True) == [head.format("After dce", "builtin.module")]
    written: list[str] = []
    with pytest.raises(PassFailedError):
        PassManager(Pipeline.of(Misbehave()), observers=[IRPrinting(written.append, after=frozenset({"*"}))]).run(
            function(X, CHAIN)
        )
    assert "After misbehave Failed" in written[0]


def test_timing_adds_up() -> None:
    timing = Timing()
    PassManager(Pipeline.parse("dce,cse"), observers=[timing]).run(moe_module())
    lines = timing.report().splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == ["dce", "cse", "(verifier and instruments)", "total"]
    seconds = [float(line.split()[0]) for line in lines[1:]]
    assert abs(sum(seconds[:-1]) - seconds[-1]) < 0.001


def test_reproducer_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "crash.mlir"
    module = function(X, CHAIN)
    before = print_operation(module, locations=True)
    manager = PassManager(Pipeline.parse("dce,func.func(misbehave{how=break})"), reproducer=file)
    with pytest.raises(InvalidResultError) as caught:
        manager.run(module, seed=11)
    assert f"--run-reproducer {file}" in caught.value.hint
    text = file.read_text(encoding="utf-8")
    found = read_reproducer(text, str(file))
    assert (found.pipeline, found.seed, found.verify_each) == ("func.func(misbehave{how=break})", 11, True)
    assert "leaves invalid IR" in found.error and "python 3." in found.versions
    assert print_operation(parse_module(text), locations=True) == before
    code, output = run_moec(["moec", "opt", str(file), "--run-reproducer", "2>&1"])
    assert code == 4 and "leaves invalid IR" in output
    header = Reproducer("a{x='1 2'}", 3, False, "two\nlines", "python 3").header()
    assert read_reproducer(header, "f") == Reproducer("a{x='1 2'}", 3, False, "two lines", "python 3")


@pytest.mark.parametrize(
    "text", ["", "// moec reproducer\n//   seed: 1\n", "// moec reproducer\n//   pipeline: a\n//   seed: x\n"]
)
def test_other_files_are_no_reproducers(text: str) -> None:
    with pytest.raises(MoecError, match="no reproducer"):
        read_reproducer(text, "some.mlir")
