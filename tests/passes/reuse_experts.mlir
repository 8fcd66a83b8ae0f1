// RUN: moec opt %s -p 'reuse-experts{direction=grow},dce' --source examples/models/tiny-moe --pass-statistics 2>&1 | filecheck %s --check-prefix=GROW
// RUN: not moec opt %s -p 'reuse-experts{direction=grow}' 2>&1 | filecheck %s --check-prefix=BARE
// RUN: not moec opt %s -p reuse-experts --source examples/models/tiny-moe 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: not moec opt %s -p 'reuse-experts{group=1}' 2>&1 | filecheck %s --check-prefix=GROUP
// RUN: not moec opt %s -p 'reuse-experts{direction=both}' 2>&1 | filecheck %s --check-prefix=DIRECTION

// Both layers have the experts of both, in the same stacks; the router's new outputs are masked.
// GROW: 16  added
// GROW: "moec.weight"() <{source = "concat(0, model.layers.0.block_sparse_moe.gate.weight, stored({{[0-9a-f]+}}))"
// GROW-SAME: tensor<16x128xf32>
// GROW: "moe.route"(%{{[0-9]+}}, %{{[0-9]+}}) <{operandSegmentSizes = [1, 0, 1, 0, 0, 0, 0, 0]
// GROW-SAME: tensor<16xi1>
// GROW: "moe.experts"
// GROW-SAME: classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 3>, #moe.class<experts = [8, 9, 10, 11, 12, 13, 14, 15], operands = 3>]
// GROW-SAME: stored = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
// GROW: model.layers.1.block_sparse_moe.gate.weight, stored(
// GROW: "moe.experts"
// GROW-SAME: classes = [#moe.class<experts = [8, 9, 10, 11, 12, 13, 14, 15], operands = 3>, #moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 3>]

// BARE: this pass reads weights, but the IR was given as text alone
// ALONE: pass reuse-experts: {{.*}}not calibrated
// GROUP: group must be at least 2
// DIRECTION: 'both' is no grow|shrink
"builtin.module"() ({
  "func.func"() <{arg_names = ["x"], function_type = (!moec.tensor<[seq, 128], f32>) -> !moec.tensor<[seq, 128], f32>, result_names = ["y"], sym_name = "main"}> ({
  ^bb0(%x: !moec.tensor<[seq, 128], f32>):
    %router = "moec.weight"() <{source = "model.layers.0.block_sparse_moe.gate.weight", weight_name = "router"}> : () -> tensor<8x128xf32>
    %gates = "moec.weight"() <{source = "stack(0, model.layers.0.block_sparse_moe.experts.{0:8}.w1.weight)", weight_name = "gate"}> : () -> tensor<8x192x128xf32>
    %ups = "moec.weight"() <{source = "stack(0, model.layers.0.block_sparse_moe.experts.{0:8}.w3.weight)", weight_name = "up"}> : () -> tensor<8x192x128xf32>
    %downs = "moec.weight"() <{source = "stack(0, model.layers.0.block_sparse_moe.experts.{0:8}.w2.weight)", weight_name = "down"}> : () -> tensor<8x128x192xf32>
    %logits = "aten.linear.default"(%x, %router) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[seq, 128], f32>, tensor<8x128xf32>) -> !moec.tensor<[seq, 8], f32>
    %chosen:3 = "moe.route"(%logits) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 2, normalize = #moe.normalize<sum>>}> : (!moec.tensor<[seq, 8], f32>) -> (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, !moec.tensor<[seq], i64>)
    %y = "moe.experts"(%x, %chosen#0, %chosen#1, %gates, %ups, %downs) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 3>], operandSegmentSizes = [1, 1, 1, 3], stored = [0, 1, 2, 3, 4, 5, 6, 7]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 128], f32>, %gate: tensor<192x128xf32>, %up: tensor<192x128xf32>, %down: tensor<128x192xf32>):
      %0 = "aten.linear.default"(%t, %gate) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 128], f32>, tensor<192x128xf32>) -> !moec.tensor<[tokens, 192], f32>
      %1 = "aten.linear.default"(%t, %up) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 128], f32>, tensor<192x128xf32>) -> !moec.tensor<[tokens, 192], f32>
      %2 = "aten.silu.default"(%0) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 192], f32>) -> !moec.tensor<[tokens, 192], f32>
      %3 = "aten.mul.Tensor"(%2, %1) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[tokens, 192], f32>, !moec.tensor<[tokens, 192], f32>) -> !moec.tensor<[tokens, 192], f32>
      %4 = "aten.linear.default"(%3, %down) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 192], f32>, tensor<128x192xf32>) -> !moec.tensor<[tokens, 128], f32>
      "moe.yield"(%4) : (!moec.tensor<[tokens, 128], f32>) -> ()
    }) : (!moec.tensor<[seq, 128], f32>, !moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, tensor<8x192x128xf32>, tensor<8x192x128xf32>, tensor<8x128x192xf32>) -> !moec.tensor<[seq, 128], f32>
    %router2 = "moec.weight"() <{source = "model.layers.1.block_sparse_moe.gate.weight", weight_name = "second.router"}> : () -> tensor<8x128xf32>
    %gates2 = "moec.weight"() <{source = "stack(0, model.layers.1.block_sparse_moe.experts.{0:8}.w1.weight)", weight_name = "second.gate"}> : () -> tensor<8x192x128xf32>
    %ups2 = "moec.weight"() <{source = "stack(0, model.layers.1.block_sparse_moe.experts.{0:8}.w3.weight)", weight_name = "second.up"}> : () -> tensor<8x192x128xf32>
    %downs2 = "moec.weight"() <{source = "stack(0, model.layers.1.block_sparse_moe.experts.{0:8}.w2.weight)", weight_name = "second.down"}> : () -> tensor<8x128x192xf32>
    %logits2 = "aten.linear.default"(%y, %router2) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[seq, 128], f32>, tensor<8x128xf32>) -> !moec.tensor<[seq, 8], f32>
    %chosen2:3 = "moe.route"(%logits2) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 2, normalize = #moe.normalize<sum>>}> : (!moec.tensor<[seq, 8], f32>) -> (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, !moec.tensor<[seq], i64>)
    %second = "moe.experts"(%y, %chosen2#0, %chosen2#1, %gates2, %ups2, %downs2) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 3>], operandSegmentSizes = [1, 1, 1, 3], stored = [0, 1, 2, 3, 4, 5, 6, 7]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 128], f32>, %gate: tensor<192x128xf32>, %up: tensor<192x128xf32>, %down: tensor<128x192xf32>):
      %0 = "aten.linear.default"(%t, %gate) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 128], f32>, tensor<192x128xf32>) -> !moec.tensor<[tokens, 192], f32>
      %1 = "aten.linear.default"(%t, %up) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 128], f32>, tensor<192x128xf32>) -> !moec.tensor<[tokens, 192], f32>
      %2 = "aten.silu.default"(%0) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 192], f32>) -> !moec.tensor<[tokens, 192], f32>
      %3 = "aten.mul.Tensor"(%2, %1) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[tokens, 192], f32>, !moec.tensor<[tokens, 192], f32>) -> !moec.tensor<[tokens, 192], f32>
      %4 = "aten.linear.default"(%3, %down) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 192], f32>, tensor<128x192xf32>) -> !moec.tensor<[tokens, 128], f32>
      "moe.yield"(%4) : (!moec.tensor<[tokens, 128], f32>) -> ()
    }) : (!moec.tensor<[seq, 128], f32>, !moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, tensor<8x192x128xf32>, tensor<8x192x128xf32>, tensor<8x128x192xf32>) -> !moec.tensor<[seq, 128], f32>
    "func.return"(%second) : (!moec.tensor<[seq, 128], f32>) -> ()
  }) : () -> ()
}) : () -> ()
