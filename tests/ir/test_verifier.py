"""Each rule of the verifier, by breaking a module that holds every operation of nn, moe and builtin."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.dialects.builtin import ModuleOp, WeightOp
from moec.dialects.moe import RouteOp, Routing, Select
from moec.dialects.nn import AttentionOp, LayerNormOp
from moec.ir import Block, DType, Op, Operation, Region, TensorType, VerifyError, parse_module, verify

TEXT = Path(__file__).with_name("all_operations.mlir").read_text(encoding="utf-8")
KINDS = sorted({op.name for op in parse_module(TEXT).walk()} - {"builtin.module"})
TYPED = [name for name in KINDS if not name.startswith("aten.")]

# A piece of the text, what it becomes, and the start of the message; each breaks one rule.
EDITS = {
    "weight of rms_norm": ("tensor<64xf32>", "tensor<63xf32>", "nn.rms_norm: weight"),
    "rms_norm without epsilon": (
        "epsilon = 1.0e-06, offset",
        "offset",
        "nn.rms_norm needs the attribute epsilon: float",
    ),
    "epsilon as an integer": ("epsilon = 1.0e-06", "epsilon = 1", "nn.rms_norm: epsilon must be float"),
    "cos wider than x": ("[batch, seq, 8]", "[batch, seq, 18]", "nn.rotary: cos"),
    "cos of odd width": ("[batch, seq, 8]", "[batch, seq, 7]", "nn.rotary: cos"),
    "interleaved as a number": ("interleaved = true", "interleaved = 1", "nn.rotary: interleaved must be bool"),
    "mask of another length": (
        "[batch, 1, seq, past + seq], i1",
        "[batch, 1, seq, seq], i1",
        "nn.attention_mask: mask",
    ),
    "mask of another type": (
        "[batch, 1, seq, past + seq], i1",
        "[batch, 1, seq, past + seq], i8",
        "nn.attention_mask: mask",
    ),
    "negative window": (
        "window = 128",
        "window = -1",
        "nn.attention_mask: window -1 and chunk 0 exclude each other and are >=",
    ),
    "window and chunk": (
        "window = 128",
        "window = 128, chunk = 64",
        "nn.attention_mask: window 128 and chunk 64 exclude each other and are ",
    ),
    "mask without causal": ("causal = true, ", "", "nn.attention_mask needs the attribute causal: bool"),
    "key heads that do not divide": (
        "batch, 2, seq, 16",
        "batch, 3, seq, 16",
        "nn.attention: 3 key heads do not divide 4 query heads",
    ),
    "past of other heads": ("batch, 2, past, 16", "batch, 1, past, 16", "nn.attention: past"),
    "present of another length": ("past + seq, 16], f32>)", "past + seq + 1, 16], f32>)", "nn.attention gives"),
    "sinks of another number": ("tensor<4xf32>", "tensor<2xf32>", "nn.attention: sinks"),
    "attention without scale": ("scale = 0.25, ", "", "nn.attention needs the attribute scale: float"),
    "segments too many": (
        "operandSegmentSizes = [1, 1, 1, 1, 1, 1, 1],",
        "operandSegmentSizes = [1, 1, 1, 1, 1, 2, 1],",
        "nn.attention: operandSegmentSizes (1, 1, 1, 1, 1, 2, 1) does not fit 7",
    ),
    "segments negative": (
        "operandSegmentSizes = [1, 1, 1, 1, 1, 1, 1],",
        "operandSegmentSizes = [1, 1, 1, 1, 1, -1, 3],",
        "nn.attention: operandSegmentSizes (1, 1, 1, 1, 1, -1, 3) does not fit ",
    ),
    "segments missing": (
        "operandSegmentSizes = [1, 1, 1, 1, 1, 1, 1], ",
        "",
        "nn.attention: operandSegmentSizes None does not fit 7 operands",
    ),
    "segments of another kind": (
        "operandSegmentSizes = [1, 2]",
        'operandSegmentSizes = "1, 2"',
        "nn.mlp: operandSegmentSizes 1, 2 does not fit 3 operands",
    ),
    "body that yields another type": (
        '"moe.yield"(%o) : (!moec.tensor<[tokens, 64], f32>)',
        '"moe.yield"(%t, %o) : (!moec.tensor<[tokens, 64], f32>, !moec.tensor<[tokens, 64], f32>)',
        "nn.mlp: the body must end in moe.yield of one",
    ),
    "body without a yield": ('"moe.yield"(%o)', '"moe.result"(%o)', "nn.mlp: the body must end in moe.yield of one"),
    "more groups than divide": (
        "groups = 4, topk_groups = 2",
        "groups = 3, topk_groups = 2",
        "moe.route: 3 groups do not divide 8 experts",
    ),
    "topk_groups above groups": (
        "groups = 4, topk_groups = 2",
        "groups = 4, topk_groups = 5",
        "moe.route: topk_groups 5 is not within 0..4",
    ),
    "k above the kept groups": (
        "topk_groups = 2, group_score = #moe.group_score<sum_top2>, k = 2",
        "topk_groups = 1, k = 3",
        "moe.route: k = 3 is not within 1..2",
    ),
    "k of zero": ("k = 2, normalize", "k = 0, normalize", "moe.route: k = 0 is not within 1..4"),
    "infinite scale": (
        "scale = 2.5",
        "scale = 0x7FF0000000000000 : f64",
        "moe.route: softcap, temperature, scale, norm_eps and norm_min must be ",
    ),
    "negative temperature": (
        "scale = 2.5",
        "temperature = -1.0",
        "moe.route: softcap, temperature, scale, norm_eps and norm_min must be ",
    ),
    "negative norm_eps": (
        "norm_eps = 1.0e-20",
        "norm_eps = -1.0e-20",
        "moe.route: softcap, temperature, scale, norm_eps and norm_min must be ",
    ),
    "softmax_selected normalised again": (
        "norm_eps = 1.0e-20",
        "weight_from = #moe.weight_from<softmax_selected>",
        "moe.route: softmax_selected gates are normalised already",
    ),
    "topp without p": (
        "softcap = 30.0, groups",
        "select = #moe.select<topp>, groups",
        "moe.route: p = 0.0 is not within (0, 1]",
    ),
    "norm over true experts without null ones": (
        "norm_eps = 1.0e-20",
        "norm_over = #moe.norm_over<true>",
        "moe.route: norm_over = true needs null experts",
    ),
    "all experts null": ("norm_eps = 1.0e-20", "null_experts = 8", "moe.route: null_experts 8 is not below 8"),
    "routing of another kind": (
        "routing = #moe.routing<score = #moe.score<sigmoid>, select = #moe.select<forced>>",
        "routing = 1",
        "moe.route: routing must be Routing",
    ),
    "ids without forced": (
        "score = #moe.score<sigmoid>, select = #moe.select<forced>",
        "k = 2",
        "moe.route: forced_ids needs select = forced",
    ),
    "experts in two classes": (
        "experts = [6, 7]",
        "experts = [5, 6]",
        "moe.experts: the classes must hold each stored expert once",
    ),
    "expert missing": (
        "experts = [6, 7]",
        "experts = [6, 8]",
        "moe.experts: the classes must hold each stored expert once",
    ),
    "stored beyond the experts": ("5, 6, -1]", "5, 6, 8]", "moe.experts: stored names expert 8, but there are 8"),
    "stored below -1": ("5, 6, -1]", "5, 6, -2]", "moe.experts: stored names expert -2, but there are 8"),
    "stored as a bool": ("5, 6, -1]", "5, 6, true]", "moe.experts: stored names expert True, but there are 8"),
    "class of too many operands": (
        "experts = [0, 1, 2, 3, 4, 5], operands = 2",
        "experts = [0, 1, 2, 3, 4, 5], operands = 3",
        "moe.experts: the classes take 5 weights, not 4",
    ),
    "more shared weights than weights": ("shared = 1", "shared = 3", "moe.experts: 3 of 2 weights are shared"),
    "shared weights below zero": ("shared = 1", "shared = -1", "moe.experts: -1 of 2 weights are shared"),
    "shared weights as a bool": ("shared = 1", "shared = true", "moe.experts: shared of #moe.class must be int"),
    "stack taken for a shared weight": ("shared = 1", "shared = 2", "moe.experts: the body takes"),
    "shared weight taken for a stack": (", shared = 1", "", "moe.experts: the stack tensor<64x64xf32> does not hold 2"),
    "protected beyond the experts": ("protected = [2, 6]", "protected = [2, 8]", "moe.experts: protected must be"),
    "protected below zero": ("protected = [2, 6]", "protected = [-1, 6]", "moe.experts: protected must be"),
    "protected out of order": ("protected = [2, 6]", "protected = [6, 2]", "moe.experts: protected must be"),
    "protected twice": ("protected = [2, 6]", "protected = [2, 2]", "moe.experts: protected must be"),
    "protected as a bool": ("protected = [2, 6]", "protected = [true, 6]", "moe.experts: protected must be"),
    "protected as a number": ("protected = [2, 6]", "protected = 2", "moe.experts: protected must be tuple"),
    "classes of another kind": (
        "#moe.class<experts = [6, 7], operands = 2, shared = 1>",
        "7",
        "moe.experts needs one region for each class of experts",
    ),
    "stack of too few experts": ("tensor<2x64xf32>", "tensor<3x64xf32>", "moe.experts: the stack"),
    "constant of another length": ('#moec.dense<"0000803f00000040">', '#moec.dense<"0000803f">', ""),
    "weight with a symbolic shape": ("tensor<64xf32>", "!moec.tensor<[seq], f32>", "a weight has a static shape, not"),
    "weight without source": ('source = "w", ', "", "moec.weight needs the attribute source: str"),
    "function of another type": (
        "-> !moec.tensor<[tokens, 64], f32>, sym_name",
        "-> !moec.tensor<[tokens, 65], f32>, sym_name",
        "the function main is",
    ),
    "function without a return": (
        '    "func.return"(%y) : (!moec.tensor<[tokens, 64], f32>) -> ()\n',
        "",
        "the function main must end in func.return",
    ),
    "argument names missing": ('"on", "forced"]', '"on"]', "the function main has 10 arguments"),
    "argument names twice": ('"on", "forced"]', '"on", "on"]', "the function main has 10 arguments"),
    "result names too many": ('result_names = ["y"]', 'result_names = ["y", "z"]', "the function main has 1 results"),
    "unknown attribute": ("interleaved = true", "interleaved = true, base = 10000", "nn.rotary has no attribute base"),
    "layout out of order": (
        '"aten.mul.Tensor"(%h, %r) <{operand_layout = ["self", "other"]}>',
        '"aten.mul.Tensor"(%h, %r) <{operand_layout = ["other", "self"]}>',
        "aten.mul.Tensor: operand_layout ['other', 'self'] is not in schema ord",
    ),
    "layout of an unknown argument": (
        'operand_layout = ["self", "other"]',
        'operand_layout = ["self", "rhs"]',
        "aten.mul.Tensor has no tensor argument 'rhs'",
    ),
    "layout missing": (
        '"aten.gelu.default"(%h) <{operand_layout = ["self"]}>',
        '"aten.gelu.default"(%h)',
        "aten.gelu.default: operand_layout names 0 of 1 operands",
    ),
    "unknown argument of aten": (
        '"aten.gelu.default"(%h) <{operand_layout',
        '"aten.gelu.default"(%h) <{tanh = true, operand_layout',
        "aten.gelu.default has no attribute 'tanh'",
    ),
    "argument of aten of another kind": (
        '"aten.gelu.default"(%h) <{operand_layout',
        '"aten.gelu.default"(%h) <{approximate = 1, operand_layout',
        "aten.gelu.default: approximate must be str, found 1",
    ),
    "struct field of another kind": (
        "k = 2, normalize",
        "k = 2.0, normalize",
        "moe.route: k of #moe.routing must be int, found 2.0",
    ),
    "rank_offset above the experts": (
        "topk_groups = 2,",
        "topk_groups = 2, rank_offset = 7,",
        "moe.route: rank_offset 7 + k 2 exceeds 8 experts",
    ),
}


def test_the_module_is_valid_and_holds_every_operation() -> None:
    verify(parse_module(TEXT))
    known = {name for name in Operation.registry if name.startswith(("nn.", "moe.", "moec.", "func."))}
    assert known <= set(KINDS)


@pytest.mark.parametrize("case", EDITS)
def test_broken_rule(case: str) -> None:
    old, new, message = EDITS[case]
    assert old in TEXT
    with pytest.raises(VerifyError) as caught:
        verify(parse_module(TEXT.replace(old, new)))
    assert caught.value.message.startswith(message)


def test_operands_that_come_together() -> None:
    _, route = find("moe.route")
    logits = route.operands[0]
    with pytest.raises(VerifyError, match="score_override and override_on come together"):
        RouteOp(logits, None, None, logits, routing=Routing(k=2))
    with pytest.raises(VerifyError, match="forced selection needs forced_ids"):
        RouteOp(logits, routing=Routing(select=Select.FORCED))
    _, norm = find("nn.layer_norm")
    x, weight, _ = norm.operands
    with pytest.raises(VerifyError, match="bias must have rank 1"):
        LayerNormOp(x, weight, x, epsilon=1e-5)
    _, attention = find("nn.attention")
    query, key, value, *_, past, _ = attention.operands
    with pytest.raises(VerifyError, match="past_key and past_value come together"):
        AttentionOp(query, key, value, None, None, past, scale=1.0)


def find(name: str) -> tuple[Operation, Operation]:
    """A fresh module and its first operation called `name`."""
    module = parse_module(TEXT)
    return module, next(op for op in module.walk() if op.name == name)


@pytest.mark.parametrize("name", [name for name in TYPED if name != "func.func"])
def test_an_operand_less_or_more(name: str) -> None:
    module, op = find(name)
    if op.operand_count:
        op.set_operands(op.operands[:-1])
        with pytest.raises(VerifyError):
            verify(module)
    module, op = find(name)
    extra = WeightOp(result_types=[TensorType((3,), DType.F32)], weight_name="extra", source="extra")
    assert op.parent is not None and op.parent.first is not None
    extra.insert_before(op.parent.first)
    op.set_operands([*op.operands, extra.value])
    with pytest.raises(VerifyError):
        verify(module)


@pytest.mark.parametrize("name", TYPED)
def test_another_result_type(name: str) -> None:
    _, op = find(name)
    wrong = TensorType((1, 1, 1), DType.F8E5M2)
    # a weight and a constant may be of any static type, but they give one tensor
    results = [wrong] * (2 if name.startswith("moec.") else max(1, len(op.results)))
    broken = Operation.create(name, op.operands, results, op.attributes, op.regions)
    assert type(broken) is type(op)
    with pytest.raises(VerifyError):
        broken.verify_op()


@pytest.mark.parametrize("name", TYPED)
def test_attributes_of_another_kind(name: str) -> None:
    kind = Operation.registry[name]
    assert issubclass(kind, Op)
    for attribute in kind.attribute_specs:
        for wrong in (object(), ("x", object()), DType.F8E5M2, 3.25 if attribute != "epsilon" else "x"):
            module, op = find(name)
            if isinstance(wrong, float) and kind.attribute_specs[attribute].kind is float:
                continue
            op.attributes[attribute] = wrong
            with pytest.raises(VerifyError):
                verify(module)


@pytest.mark.parametrize("name", TYPED)
def test_a_region_less_or_more(name: str) -> None:
    module, op = find(name)
    op.regions = (*op.regions, Region(Block()))
    op.regions[-1].parent = op
    with pytest.raises(VerifyError):
        verify(module)
    module, op = find(name)
    if op.regions:
        for region in op.regions:
            for nested in reversed(region.block):
                nested.drop_all_references()
        op.regions = ()
        with pytest.raises(VerifyError):
            op.verify_op()


def test_structure() -> None:
    module, op = find("nn.layer_norm")
    op.operands[0].uses.pop((op, 0))
    with pytest.raises(VerifyError, match="use list"):
        verify(module)
    module, op = find("nn.layer_norm")
    following = op.next
    assert following is not None
    op.detach()
    op.insert_after(following)
    verify(module)  # mlp, which reads it, stands further down
    assert following.next is op
    op.detach()
    last = module.regions[0].block.first
    assert last is not None
    op.insert_before(last.regions[0].block.terminator)
    with pytest.raises(VerifyError, match="does not dominate") as caught:
        verify(module)
    assert "nn.mlp" in caught.value.where


@pytest.mark.parametrize("name", ["nn.mlp", "moe.experts"])
def test_bodies_are_closed(name: str) -> None:
    module, op = find(name)
    body = op.regions[0].block
    assert body.first is not None
    # the right type, but from outside: the stack or weight of the whole operation
    index = next(i for i, value in enumerate(op.operands) if value.type == body.first.operands[1].type or i == 3)
    copy = body.first.clone({body.first.operands[1]: op.operands[index]})
    copy.insert_before(body.first)
    with pytest.raises(VerifyError, match=f"operand 1 of aten.linear.default is from outside of {name}"):
        verify(module)


def test_two_functions_of_one_name() -> None:
    module = parse_module(TEXT)
    assert isinstance(module, ModuleOp)
    module.body.append(module.main.clone())
    with pytest.raises(VerifyError, match="two functions are named main"):
        verify(module)


def test_messages_show_the_neighbours_and_never_the_module() -> None:
    text = TEXT.replace("interleaved = true", "interleaved = 1")
    with pytest.raises(VerifyError) as caught:
        verify(parse_module(text, "some.mlir"))
    where = caught.value.where
    assert "-> " in where and "nn.layer_norm" in where and "nn.attention_mask" in where and "some.mlir:" in where
    assert len(where) < 1500
