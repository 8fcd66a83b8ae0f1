// RUN: moec opt %s -p 'prune-micro-experts{ratio=0.5 criterion=magnitude scope=expert},dce' --source examples/models/tiny-moe | filecheck %s --check-prefix=HALF
// RUN: moec opt %s -p 'prune-micro-experts{ratio=0.5 criterion=magnitude round-to=192},dce' --source examples/models/tiny-moe | filecheck %s --check-prefix=WHOLE
// RUN: moec opt %s -p 'prune-micro-experts{ratio=0.25 criterion=random}' --source examples/models/tiny-moe --pass-statistics 2>&1 | filecheck %s --check-prefix=COUNT
// RUN: not moec opt %s -p 'prune-micro-experts{ratio=1}' 2>&1 | filecheck %s --check-prefix=RATIO
// RUN: not moec opt %s -p prune-micro-experts 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'prune-micro-experts{ratio=0.2 criterion=hepr}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'prune-micro-experts{ratio=0.2}' --source examples/models/tiny-moe 2>&1 | filecheck %s --check-prefix=ALONE

// Half of the neurons of each expert: one class, narrower, whose body is in canonical form.
// HALF-NOT: 192
// HALF: stored({{[0-9a-f]+}})
// HALF-SAME: tensor<8x96x128xf32>
// HALF: "moe.experts"
// HALF-SAME: classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5, 6, 7], operands = 3>]
// HALF-NEXT: ^bb0(%{{.*}}: !moec.tensor<[tokens, 128], f32>, %{{.*}}: tensor<96x128xf32>, %{{.*}}: tensor<96x128xf32>, %{{.*}}: tensor<128x96xf32>):
// HALF: "aten.silu.default"
// HALF: "aten.linear.default"
// HALF-SAME: tensor<128x96xf32>

// Rounding up to the whole width gives every neuron back: the weights are those of the files.
// WHOLE: stack(0, model.layers.0.block_sparse_moe.experts.{0:8}.w1.weight)
// WHOLE-NOT: stored(

// COUNT: 1536  neurons
// COUNT-NEXT: 384  removed
// RATIO: ratio 1 is not within 0 <= ratio < 1
// NONE: pass prune-micro-experts needs the option ratio
// SPELLING: did you mean 'heapr'
// ALONE: pass prune-micro-experts: {{.*}}not calibrated
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
    "func.return"(%y) : (!moec.tensor<[seq, 128], f32>) -> ()
  }) : () -> ()
}) : () -> ()
