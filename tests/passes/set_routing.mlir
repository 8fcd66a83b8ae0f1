// A route of its own, two of eight experts: the number changes, nothing else does.
// RUN: moec opt %s -p 'set-routing{k=3 combine=one scale=constant factor=1.5}' | filecheck %s
// RUN: not moec opt %s -p 'set-routing{k=9}' 2>&1 | filecheck %s --check-prefix=MANY
// RUN: moec opt %s -p 'set-routing{select=top-p p=0.5 k_min=2 crossing=false combine=one-plus u=0.25}' | filecheck %s --check-prefix=TOPP
// RUN: moec opt %s -p 'set-routing{select=entropy}' | filecheck %s --check-prefix=ENTROPY
// RUN: not moec opt %s -p 'set-routing{k=2 scope=sequence}' 2>&1 | filecheck %s --check-prefix=SEQUENCE
// RUN: not moec opt %s -p 'set-routing{k=-1}' 2>&1 | filecheck %s --check-prefix=NEGATIVE

// MANY: 9 experts cannot be chosen among 8
// NEGATIVE: k must not be negative
// SEQUENCE: the model has no input input_ids
// TOPP: "moe.route"
// TOPP-SAME: select = #moe.select<topp>, k_min = 2, p = 0.5, take_crossing = false, scale = 0.25, offset = 1.0>
// TOPP-SAME: [batch * seq, 8], i64
// ENTROPY: select = #moe.select<entropy>, p = 0.75, entropy_q = 1.1, entropy_threshold = 1.68
// CHECK: "moe.route"
// CHECK-SAME: k = 3
// CHECK-SAME: weight_from = #moe.weight_from<one>, scale = 1.5>
// CHECK: "moe.experts"
// CHECK-SAME: stored = [0, 1, 2, 3, 4, 5, 6, 7]
"builtin.module"() ({
  "func.func"() <{function_type = (!moec.tensor<[batch * seq, 64], f32>) -> !moec.tensor<[batch * seq, 64], f32>, sym_name = "main"}> ({
  ^bb0(%arg0: !moec.tensor<[batch * seq, 64], f32>):
    %0 = "moec.weight"() <{source = "router.weight", weight_name = "router"}> : () -> tensor<8x64xf32>
    %1 = "moec.weight"() <{source = "stack(0, experts.{0:8}.gate_up)", weight_name = "gate_up"}> : () -> tensor<8x96x64xf32>
    %2 = "moec.weight"() <{source = "stack(0, experts.{0:8}.down)", weight_name = "down"}> : () -> tensor<8x64x48xf32>
    %3 = "aten.linear.default"(%arg0, %0) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[batch * seq, 64], f32>, tensor<8x64xf32>) -> !moec.tensor<[batch * seq, 8], f32>
    %4:3 = "moe.route"(%3) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 2, normalize = #moe.normalize<sum>>}> : (!moec.tensor<[batch * seq, 8], f32>) -> (!moec.tensor<[batch * seq, 2], i64>, !moec.tensor<[batch * seq, 2], f32>, !moec.tensor<[batch * seq], i64>)
    %5 = "moe.experts"(%arg0, %4#0, %4#1, %1, %2) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 2>], operandSegmentSizes = [1, 1, 1, 2], stored = [0, 1, 2, 3, 4, 5, 6, 7]}> ({
    ^bb0(%arg1: !moec.tensor<[tokens, 64], f32>, %arg2: tensor<96x64xf32>, %arg3: tensor<64x48xf32>):
      %6 = "aten.linear.default"(%arg1, %arg2) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 64], f32>, tensor<96x64xf32>) -> !moec.tensor<[tokens, 96], f32>
      %7:2 = "aten.chunk.default"(%6) <{chunks = 2, dim = -1, operand_layout = ["self"]}> : (!moec.tensor<[tokens, 96], f32>) -> (!moec.tensor<[tokens, 48], f32>, !moec.tensor<[tokens, 48], f32>)
      %8 = "aten.silu.default"(%7#0) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 48], f32>) -> !moec.tensor<[tokens, 48], f32>
      %9 = "aten.mul.Tensor"(%8, %7#1) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[tokens, 48], f32>, !moec.tensor<[tokens, 48], f32>) -> !moec.tensor<[tokens, 48], f32>
      %10 = "aten.linear.default"(%9, %arg3) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 48], f32>, tensor<64x48xf32>) -> !moec.tensor<[tokens, 64], f32>
      "moe.yield"(%10) : (!moec.tensor<[tokens, 64], f32>) -> ()
    }) : (!moec.tensor<[batch * seq, 64], f32>, !moec.tensor<[batch * seq, 2], i64>, !moec.tensor<[batch * seq, 2], f32>, tensor<8x96x64xf32>, tensor<8x64x48xf32>) -> !moec.tensor<[batch * seq, 64], f32>
    "func.return"(%5) : (!moec.tensor<[batch * seq, 64], f32>) -> ()
  }) {arg_names = ["x"], result_names = ["y"]} : () -> ()
}) : () -> ()
