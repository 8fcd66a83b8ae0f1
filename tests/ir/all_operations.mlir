// RUN: moec opt %s | filecheck %s
// RUN: moec opt %s -p 'builtin.module(func.func(dce))' --verify-each -o -

// Every operation of the dialects nn, moe and builtin, each with the operands and attributes that it can have.
// CHECK: "builtin.module"() ({
"builtin.module"() ({
  // CHECK: "func.func"() <{function_type = {{.*}}, sym_name = "main"}>
  "func.func"() <{function_type = (!moec.tensor<[batch, seq, 64], f32>, !moec.tensor<[batch, past + seq], i64>, !moec.tensor<[batch, 4, seq, 16], f32>, !moec.tensor<[batch, 2, seq, 16], f32>, !moec.tensor<[batch, 2, past, 16], f32>, !moec.tensor<[batch, seq, 8], f32>, !moec.tensor<[tokens, 64], f32>, !moec.tensor<[tokens, 8], f32>, !moec.tensor<[tokens], i1>, !moec.tensor<[tokens, 2], i64>) -> !moec.tensor<[tokens, 64], f32>, sym_name = "main"}> ({
  ^bb0(%x: !moec.tensor<[batch, seq, 64], f32>, %padding: !moec.tensor<[batch, past + seq], i64>, %q: !moec.tensor<[batch, 4, seq, 16], f32>, %kv: !moec.tensor<[batch, 2, seq, 16], f32>, %past: !moec.tensor<[batch, 2, past, 16], f32>, %angle: !moec.tensor<[batch, seq, 8], f32>, %rows: !moec.tensor<[tokens, 64], f32>, %logits: !moec.tensor<[tokens, 8], f32>, %on: !moec.tensor<[tokens], i1>, %forced: !moec.tensor<[tokens, 2], i64>):
    // CHECK: "moec.weight"() <{source = "w", weight_name = "norm"}>
    %w = "moec.weight"() <{source = "w", weight_name = "norm"}> : () -> tensor<64xf32>
    %e = "moec.weight"() <{source = "e", weight_name = "bias"}> : () -> tensor<8xf32>
    %sinks = "moec.weight"() <{source = "s", weight_name = "sinks"}> : () -> tensor<4xf32>
    %up = "moec.weight"() <{source = "u", weight_name = "up"}> : () -> tensor<96x64xf32>
    %down = "moec.weight"() <{source = "d", weight_name = "down"}> : () -> tensor<64x96xf32>
    %ups = "moec.weight"() <{source = "us", weight_name = "ups"}> : () -> tensor<6x96x64xf32>
    %downs = "moec.weight"() <{source = "ds", weight_name = "downs"}> : () -> tensor<6x64x96xf32>
    %row = "moec.weight"() <{source = "r", weight_name = "row"}> : () -> tensor<2x64xf32>
    %base = "moec.weight"() <{source = "b", weight_name = "base"}> : () -> tensor<64x64xf32>
    // CHECK: "moec.constant"() <{data = #moec.dense<"0000803f00000040">}>
    %c = "moec.constant"() <{data = #moec.dense<"0000803f00000040">}> : () -> tensor<2xf32>
    // CHECK: "nn.rms_norm"
    %rms = "nn.rms_norm"(%x, %w) <{epsilon = 1.0e-06, offset = 1.0, operandSegmentSizes = [1, 1]}> : (!moec.tensor<[batch, seq, 64], f32>, tensor<64xf32>) -> !moec.tensor<[batch, seq, 64], f32>
    // CHECK: "nn.layer_norm"
    %ln = "nn.layer_norm"(%rms, %w, %w) <{epsilon = 1.0e-05, operandSegmentSizes = [1, 1, 1]}> : (!moec.tensor<[batch, seq, 64], f32>, tensor<64xf32>, tensor<64xf32>) -> !moec.tensor<[batch, seq, 64], f32>
    // CHECK: "nn.rotary"
    %rotated = "nn.rotary"(%q, %angle, %angle) <{interleaved = true}> : (!moec.tensor<[batch, 4, seq, 16], f32>, !moec.tensor<[batch, seq, 8], f32>, !moec.tensor<[batch, seq, 8], f32>) -> !moec.tensor<[batch, 4, seq, 16], f32>
    // CHECK: "nn.attention_mask"
    %mask = "nn.attention_mask"(%padding) <{causal = true, window = 128}> : (!moec.tensor<[batch, past + seq], i64>) -> !moec.tensor<[batch, 1, seq, past + seq], i1>
    // CHECK: "nn.attention"
    %attended:3 = "nn.attention"(%rotated, %kv, %kv, %mask, %sinks, %past, %past) <{operandSegmentSizes = [1, 1, 1, 1, 1, 1, 1], scale = 0.25, softcap = 30.0}> : (!moec.tensor<[batch, 4, seq, 16], f32>, !moec.tensor<[batch, 2, seq, 16], f32>, !moec.tensor<[batch, 2, seq, 16], f32>, !moec.tensor<[batch, 1, seq, past + seq], i1>, tensor<4xf32>, !moec.tensor<[batch, 2, past, 16], f32>, !moec.tensor<[batch, 2, past, 16], f32>) -> (!moec.tensor<[batch, seq, 4, 16], f32>, !moec.tensor<[batch, 2, past + seq, 16], f32>, !moec.tensor<[batch, 2, past + seq, 16], f32>)
    // CHECK: "nn.mlp"
    %mlp = "nn.mlp"(%ln, %up, %down) <{operandSegmentSizes = [1, 2]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 64], f32>, %u: tensor<96x64xf32>, %d: tensor<64x96xf32>):
      %h = "aten.linear.default"(%t, %u) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 64], f32>, tensor<96x64xf32>) -> !moec.tensor<[tokens, 96], f32>
      %a = "aten.gelu.default"(%h) <{operand_layout = ["self"]}> : (!moec.tensor<[tokens, 96], f32>) -> !moec.tensor<[tokens, 96], f32>
      %o = "aten.linear.default"(%a, %d) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 96], f32>, tensor<64x96xf32>) -> !moec.tensor<[tokens, 64], f32>
      // CHECK: "moe.yield"
      "moe.yield"(%o) : (!moec.tensor<[tokens, 64], f32>) -> ()
    }) : (!moec.tensor<[batch, seq, 64], f32>, tensor<96x64xf32>, tensor<64x96xf32>) -> !moec.tensor<[batch, seq, 64], f32>
    %on8 = "moec.weight"() <{source = "m", weight_name = "mask"}> : () -> tensor<8xi1>
    // CHECK: "moe.route"
    %ids, %gates, %count = "moe.route"(%logits, %e, %on8, %logits, %on, %e, %e) <{operandSegmentSizes = [1, 1, 1, 1, 1, 1, 0, 1], routing = #moe.routing<softcap = 30.0, groups = 4, topk_groups = 2, group_score = #moe.group_score<sum_top2>, k = 2, normalize = #moe.normalize<sum>, norm_eps = 1.0e-20, scale = 2.5>}> : (!moec.tensor<[tokens, 8], f32>, tensor<8xf32>, tensor<8xi1>, !moec.tensor<[tokens, 8], f32>, !moec.tensor<[tokens], i1>, tensor<8xf32>, tensor<8xf32>) -> (!moec.tensor<[tokens, 2], i64>, !moec.tensor<[tokens, 2], f32>, !moec.tensor<[tokens], i64>)
    %ids2, %gates2, %count2 = "moe.route"(%logits, %forced) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 1, 0], routing = #moe.routing<score = #moe.score<sigmoid>, select = #moe.select<forced>>}> : (!moec.tensor<[tokens, 8], f32>, !moec.tensor<[tokens, 2], i64>) -> (!moec.tensor<[tokens, 2], i64>, !moec.tensor<[tokens, 2], f32>, !moec.tensor<[tokens], i64>)
    // CHECK: "moe.replica"(%{{[0-9]+}}#0, %{{[0-9]+}}#1) <{high = 0.6, low = 0.9, outputs = 8}>
    %ids3, %gates3 = "moe.replica"(%ids2, %gates2) <{high = 0.6, low = 0.9, outputs = 8}> : (!moec.tensor<[tokens, 2], i64>, !moec.tensor<[tokens, 2], f32>) -> (!moec.tensor<[tokens, 2], i64>, !moec.tensor<[tokens, 2], f32>)
    // CHECK: "moe.experts"{{.*}}#moe.class<experts = [0, 1, 2, 3, 4, 5], operands = 2>, #moe.class<experts = [6, 7], operands = 2, shared = 1>], operandSegmentSizes = [1, 1, 1, 4], protected = [2, 6], stored =
    %y = "moe.experts"(%rows, %ids, %gates, %ups, %downs, %row, %base) <{classes = [#moe.class<experts = [0, 1, 2, 3, 4, 5], operands = 2>, #moe.class<experts = [6, 7], operands = 2, shared = 1>], operandSegmentSizes = [1, 1, 1, 4], protected = [2, 6], stored = [0, 1, 2, 3, 4, 5, 6, -1]}> ({
    ^bb0(%t: !moec.tensor<[tokens, 64], f32>, %u: tensor<96x64xf32>, %d: tensor<64x96xf32>):
      %h = "aten.linear.default"(%t, %u) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 64], f32>, tensor<96x64xf32>) -> !moec.tensor<[tokens, 96], f32>
      %o = "aten.linear.default"(%h, %d) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 96], f32>, tensor<64x96xf32>) -> !moec.tensor<[tokens, 64], f32>
      "moe.yield"(%o) : (!moec.tensor<[tokens, 64], f32>) -> ()
    }, {
    ^bb0(%t: !moec.tensor<[tokens, 64], f32>, %r: tensor<64xf32>, %b: tensor<64x64xf32>):
      %h = "aten.linear.default"(%t, %b) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[tokens, 64], f32>, tensor<64x64xf32>) -> !moec.tensor<[tokens, 64], f32>
      %o = "aten.mul.Tensor"(%h, %r) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[tokens, 64], f32>, tensor<64xf32>) -> !moec.tensor<[tokens, 64], f32>
      "moe.yield"(%o) : (!moec.tensor<[tokens, 64], f32>) -> ()
    }) : (!moec.tensor<[tokens, 64], f32>, !moec.tensor<[tokens, 2], i64>, !moec.tensor<[tokens, 2], f32>, tensor<6x96x64xf32>, tensor<6x64x96xf32>, tensor<2x64xf32>, tensor<64x64xf32>) -> !moec.tensor<[tokens, 64], f32>
    // CHECK: "func.return"
    "func.return"(%y) : (!moec.tensor<[tokens, 64], f32>) -> ()
  // CHECK: arg_names = ["x", "padding", {{.*}}], result_names = ["y"]
  }) {arg_names = ["x", "padding", "query", "key", "past", "angle", "rows", "logits", "on", "forced"], result_names = ["y"]} : () -> ()
}) : () -> ()
