// Options that cannot be are refused before anything runs; a whitened basis needs calibration, any basis weights.
// RUN: not moec opt %s -p low-rank 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'low-rank{rank=2 ratio=0.5}' 2>&1 | filecheck %s --check-prefix=BOTH
// RUN: not moec opt %s -p 'low-rank{rank=0}' 2>&1 | filecheck %s --check-prefix=ZERO
// RUN: not moec opt %s -p 'low-rank{ratio=1}' 2>&1 | filecheck %s --check-prefix=SAVES
// RUN: not moec opt %s -p 'low-rank{energy=1.5}' 2>&1 | filecheck %s --check-prefix=ENERGY
// RUN: not moec opt %s -p 'low-rank{ratio=0.2 residual=0.3}' 2>&1 | filecheck %s --check-prefix=RESIDUAL
// RUN: not moec opt %s -p 'low-rank{rank=2 residual=0.3 base=frequency}' 2>&1 | filecheck %s --check-prefix=EXCLUDE
// RUN: not moec opt %s -p 'low-rank{rank=2 damping=-1}' 2>&1 | filecheck %s --check-prefix=DAMPING
// RUN: not moec opt %s -p 'low-rank{rank=2 basis=white}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'low-rank{rank=2}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: give one of rank, ratio and energy, not 0 of them
// BOTH: give one of rank, ratio and energy, not 2 of them
// ZERO: rank 0 is below 1
// SAVES: ratio 1 is not within (0, 1); at 1 nothing would be saved
// ENERGY: energy 1.5 is not within (0, 1]
// RESIDUAL: ratio 0.2 leaves nothing beside a residual of 0.3
// EXCLUDE: neurons that stay whole and a base exclude each other
// DAMPING: damping -1 is negative
// SPELLING: 'white' is no plain|whitened|gate-whitened
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
