// Options that cannot be are refused before anything runs.
// RUN: not moec opt %s -p latent-factorize 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'latent-factorize{rank=0}' 2>&1 | filecheck %s --check-prefix=ZERO
// RUN: not moec opt %s -p 'latent-factorize{ratio=1}' 2>&1 | filecheck %s --check-prefix=SAVES
// RUN: not moec opt %s -p 'latent-factorize{rank=2 group=1}' 2>&1 | filecheck %s --check-prefix=GROUP
// RUN: not moec opt %s -p 'latent-factorize{rank=2 own-rank=0}' 2>&1 | filecheck %s --check-prefix=OWN
// RUN: not moec opt %s -p 'latent-factorize{rank=2 share=both}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'latent-factorize{rank=2 sides=in}' 2>&1 | filecheck %s --check-prefix=SIDES
// RUN: not moec opt %s -p 'latent-factorize{rank=2}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: give one of rank, ratio and energy, not 0 of them
// ZERO: rank 0 is below 1
// SAVES: ratio 1 is not within (0, 1); at 1 nothing would be saved
// GROUP: a group of 1 shares nothing; give 0 or at least 2
// OWN: own-rank 0 is below 1
// SPELLING: 'both' is no outer|right|left
// SIDES: 'in' is no list of gate|up|down
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
