// Packed experts take ui8 stacks; options that cannot be are refused before anything runs.
// RUN: not moec opt %s -p 'quantize{bits=9}' 2>&1 | filecheck %s --check-prefix=BITS
// RUN: not moec opt %s -p 'quantize{group=some}' 2>&1 | filecheck %s --check-prefix=GROUP
// RUN: not moec opt %s -p 'quantize{group=0}' 2>&1 | filecheck %s --check-prefix=ZERO
// RUN: not moec opt %s -p 'quantize{kind=kmeans bits=0}' 2>&1 | filecheck %s --check-prefix=BOOK
// RUN: not moec opt %s -p 'quantize{kind=int4}' 2>&1 | filecheck %s --check-prefix=KIND
// RUN: not moec opt %s -p 'quantize{method=gptq damping=0}' 2>&1 | filecheck %s --check-prefix=DAMPING
// RUN: not moec opt %s -p 'quantize{method=gptq calibration=some}' 2>&1 | filecheck %s --check-prefix=POLICY
// RUN: not moec opt %s -p 'quantize{method=block-ap kind=nf4}' 2>&1 | filecheck %s --check-prefix=TRAINED
// RUN: not moec opt %s -p quantize 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: moec opt %s -p canonicalize,cse,dce | filecheck %s --check-prefix=KEPT

// BITS: integers have 1 to 8 bits, not 9
// GROUP: group 'some' is no number of columns, nor row or tensor
// ZERO: group '0' is no number of columns
// BOOK: a codebook has 1 to 8 bits, not 0
// KIND: 'int4' is no integer|ternary|nf4|kmeans|mxfp4|nvfp4
// DAMPING: damping 0 is not above 0
// POLICY: 'some' is no routed|affinity|all|balanced|auto
// TRAINED: block-ap trains integers, not nf4
// ALONE: this pass reads weights, but the IR was given as text alone

// KEPT: [[CODES:%[a-z0-9_]+]] = "moec.weight"() <{source = "codes", weight_name = "codes"}> : () -> tensor<2x6x2xui8>
// KEPT: "quant.dequant"({{.*}}) <{columns = 4, format = #quant.integer<bits = 4>, operandSegmentSizes = [1, 1, 0, 0, 0, 0]}> : (tensor<6x2xui8>, tensor<6x1xf32>) -> tensor<6x4xf32>
"builtin.module"() ({
  "func.func"() <{function_type = (!moec.tensor<[seq, 4], f32>) -> !moec.tensor<[seq, 4], f32>, sym_name = "main"}> ({
  ^bb0(%x: !moec.tensor<[seq, 4], f32>):
    %router = "moec.weight"() <{source = "router", weight_name = "router"}> : () -> tensor<2x4xf32>
    %codes = "moec.weight"() <{source = "codes", weight_name = "codes"}> : () -> tensor<2x6x2xui8>
    %scales = "moec.weight"() <{source = "scales", weight_name = "scales"}> : () -> tensor<2x6x1xf32>
    %down = "moec.weight"() <{source = "down", weight_name = "down"}> : () -> tensor<2x4x6xf32>
    %logits = "aten.linear.default"(%x, %router) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[seq, 4], f32>, tensor<2x4xf32>) -> !moec.tensor<[seq, 2], f32>
    %ids, %gates, %count = "moe.route"(%logits) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 1>}> : (!moec.tensor<[seq, 2], f32>) -> (!moec.tensor<[seq, 1], i64>, !moec.tensor<[seq, 1], f32>, !moec.tensor<[seq], i64>)
    %y = "moe.experts"(%x, %ids, %gates, %codes, %scales, %down) <{classes = [#moe.class<experts = [0, 1], operands = 3>], operandSegmentSizes = [1, 1, 1, 3], stored = [0, 1]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 4], f32>, %c: tensor<6x2xui8>, %s: tensor<6x1xf32>, %d: tensor<4x6xf32>):
      %u = "quant.dequant"(%c, %s) <{columns = 4, format = #quant.integer<bits = 4>, operandSegmentSizes = [1, 1, 0, 0, 0, 0]}> : (tensor<6x2xui8>, tensor<6x1xf32>) -> tensor<6x4xf32>
      %h = "aten.linear.default"(%t, %u) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 4], f32>, tensor<6x4xf32>) -> !moec.tensor<[tokens, 6], f32>
      %r = "aten.relu.default"(%h) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 6], f32>) -> !moec.tensor<[tokens, 6], f32>
      %o = "aten.linear.default"(%r, %d) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 6], f32>, tensor<4x6xf32>) -> !moec.tensor<[tokens, 4], f32>
      "moe.yield"(%o) : (!moec.tensor<[tokens, 4], f32>) -> ()
    }) : (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 1], i64>, !moec.tensor<[seq, 1], f32>, tensor<2x6x2xui8>, tensor<2x6x1xf32>, tensor<2x4x6xf32>) -> !moec.tensor<[seq, 4], f32>
    "func.return"(%y) : (!moec.tensor<[seq, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()
