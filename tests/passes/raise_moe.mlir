// RUN: moec opt %s -p raise-moe,dce | filecheck %s
// RUN: moec opt %s -p raise-moe,dce --explain 2>&1 | filecheck %s --check-prefix=EXPLAIN

"builtin.module"() ({
  // CHECK-LABEL: sym_name = "softmax_then_best"
  "func.func"() <{function_type = (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 8], f32>) -> !moec.tensor<[seq, 4], f32>, sym_name = "softmax_then_best"}> ({
  ^bb0(%x: !moec.tensor<[seq, 4], f32>, %logits: !moec.tensor<[seq, 8], f32>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<8x4x4xf32>
    %scores = "aten.softmax.int"(%logits) <{dim = -1, operand_layout = ["self"]}> : (!moec.tensor<[seq, 8], f32>) -> !moec.tensor<[seq, 8], f32>
    %best:2 = "aten.topk.default"(%scores) <{k = 2, operand_layout = ["self"]}> : (!moec.tensor<[seq, 8], f32>) -> (!moec.tensor<[seq, 2], f32>, !moec.tensor<[seq, 2], i64>)
    %sum = "aten.sum.dim_IntList"(%best#0) <{dim = [-1], keepdim = true, operand_layout = ["self"]}> : (!moec.tensor<[seq, 2], f32>) -> !moec.tensor<[seq, 1], f32>
    %gates = "aten.div.Tensor"(%best#0, %sum) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[seq, 2], f32>, !moec.tensor<[seq, 1], f32>) -> !moec.tensor<[seq, 2], f32>
    // CHECK-NOT: aten.topk.default
    // CHECK: [[ROUTE:%.*]]:3 = "moe.route"(%arg1) <{
    // CHECK-SAME: routing = #moe.routing<k = 2, normalize = #moe.normalize<sum>>
    // CHECK: "moe.experts"(%arg0, [[ROUTE]]#0, [[ROUTE]]#1
    %y = "moe.experts"(%x, %best#1, %gates, %w) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 1>], operandSegmentSizes = [1, 1, 1, 1], stored = [0, 1, 2, 3, 4, 5, 6, 7]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 4], f32>, %one: tensor<4x4xf32>):
      %out = "aten.linear.default"(%t, %one) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 4], f32>, tensor<4x4xf32>) -> !moec.tensor<[tokens, 4], f32>
      "moe.yield"(%out) : (!moec.tensor<[tokens, 4], f32>) -> ()
    }) : (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, tensor<8x4x4xf32>) -> !moec.tensor<[seq, 4], f32>
    "func.return"(%y) : (!moec.tensor<[seq, 4], f32>) -> ()
  }) : () -> ()

  // Gates that depend on the token besides its logits are no routing.
  // CHECK-LABEL: sym_name = "gates_of_the_token"
  // CHECK-NOT: moe.route
  // EXPLAIN: raise-moe refused moe.experts: the gates come from aten.mul.Tensor
  "func.func"() <{function_type = (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 8], f32>, !moec.tensor<[seq, 1], f32>) -> !moec.tensor<[seq, 4], f32>, sym_name = "gates_of_the_token"}> ({
  ^bb0(%x: !moec.tensor<[seq, 4], f32>, %logits: !moec.tensor<[seq, 8], f32>, %size: !moec.tensor<[seq, 1], f32>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<8x4x4xf32>
    %scores = "aten.softmax.int"(%logits) <{dim = -1, operand_layout = ["self"]}> : (!moec.tensor<[seq, 8], f32>) -> !moec.tensor<[seq, 8], f32>
    %best:2 = "aten.topk.default"(%scores) <{k = 2, operand_layout = ["self"]}> : (!moec.tensor<[seq, 8], f32>) -> (!moec.tensor<[seq, 2], f32>, !moec.tensor<[seq, 2], i64>)
    %gates = "aten.mul.Tensor"(%best#0, %size) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[seq, 2], f32>, !moec.tensor<[seq, 1], f32>) -> !moec.tensor<[seq, 2], f32>
    %y = "moe.experts"(%x, %best#1, %gates, %w) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 1>], operandSegmentSizes = [1, 1, 1, 1], stored = [0, 1, 2, 3, 4, 5, 6, 7]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 4], f32>, %one: tensor<4x4xf32>):
      %out = "aten.linear.default"(%t, %one) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 4], f32>, tensor<4x4xf32>) -> !moec.tensor<[tokens, 4], f32>
      "moe.yield"(%out) : (!moec.tensor<[tokens, 4], f32>) -> ()
    }) : (!moec.tensor<[seq, 4], f32>, !moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, tensor<8x4x4xf32>) -> !moec.tensor<[seq, 4], f32>
    "func.return"(%y) : (!moec.tensor<[seq, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()
