// RUN: not moec opt %s -p 'sparsify-delta{density=0}' 2>&1 | filecheck %s --check-prefix=DENSITY
// RUN: not moec opt %s -p 'sparsify-delta{base-bits=1}' 2>&1 | filecheck %s --check-prefix=BITS
// RUN: not moec opt %s -p 'sparsify-delta{multiples=1,0}' 2>&1 | filecheck %s --check-prefix=MULTIPLES
// RUN: not moec opt %s -p sparsify-delta 2>&1 | filecheck %s --check-prefix=ALONE

// DENSITY: density 0 is not within (0, 1]
// BITS: base-bits 1 is neither 0 nor within 2..8
// MULTIPLES: multiples must be above 0
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (!moec.tensor<[seq, 4], f32>) -> !moec.tensor<[seq, 4], f32>, sym_name = "main"}> ({
  ^bb0(%x: !moec.tensor<[seq, 4], f32>):
    %router = "moec.weight"() <{source = "router", weight_name = "router"}> : () -> tensor<2x4xf32>
    %up = "moec.weight"() <{source = "up", weight_name = "up"}> : () -> tensor<2x6x4xf32>
    %down = "moec.weight"() <{source = "down", weight_name = "down"}> : () -> tensor<2x4x6xf32>
    %logits = "aten.linear.default"(%x, %router) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[seq, 4], f32>, tensor<2x4xf32>) -> !moec.tensor<[seq, 2], f32>
    %ids, %gates, %count = "moe.route"(%logits) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 1>}> : (!moec.tensor<[seq, 2], f32>) -> (!moec.tensor<[seq, 1], i64>, !moec.tensor<[seq, 1], f32>, !moec.tensor<[seq], i64>)
    %y = "moe.experts"(%x, %ids, %gates, %up, %down) <{classes = [#moe.class<experts = [0, 1], operands = 2>], operandSegmentSizes = [1, 1, 1, 2], stored = [0, 1]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 4], f32>, %u: tensor<6x4xf32>, %d: tensor<4x6xf32>):
      %h = "aten.linear.default"(%t, %u) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 4], f32>, tensor<6x4xf32>) -> !moec.tensor<[tokens, 6], f32>
      %r = "aten.relu.default"(%h) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 6], f32>) -> !moec.tensor<[tokens, 6], f32>
      %o = "aten.linear.default"(%r, %d) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 6], f32>, tensor<4x6xf32>) -> !moec.tensor<[tokens, 4], f32>
      "moe.yield"(%o) : (!moec.tensor<[tokens, 4], f32>) -> ()
    }) : (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 1], i64>, !moec.tensor<[seq, 1], f32>, tensor<2x6x4xf32>, tensor<2x4x6xf32>) -> !moec.tensor<[seq, 4], f32>
    "func.return"(%y) : (!moec.tensor<[seq, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()
