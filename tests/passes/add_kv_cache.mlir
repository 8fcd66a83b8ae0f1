// RUN: moec opt %s -p 'add-kv-cache{equal-widths=false}' --split-input-file | filecheck %s
// RUN: moec opt %s -p add-kv-cache --split-input-file | filecheck %s --check-prefix=WIDTHS
// RUN: moec opt %s -p add-kv-cache --split-input-file --explain 2>&1 | filecheck %s --check-prefix=EXPLAIN

// Two layers share their keys and values, so there is one cache.
"builtin.module"() ({
  // CHECK: ^bb0(%arg0: !moec.tensor<[batch, seq], i64>, %arg1: !moec.tensor<[batch, past + seq], i64>, %arg2: !moec.tensor<[batch, 1, past, 4], f32>
  "func.func"() <{arg_names = ["input_ids", "attention_mask"], function_type = (!moec.tensor<[batch, seq], i64>, !moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 1, 4], f32>, result_names = ["logits"], sym_name = "main"}> ({
  ^bb0(%ids: !moec.tensor<[batch, seq], i64>, %padding: !moec.tensor<[batch, seq], i64>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<9x4xf32>
    %x = "aten.embedding.default"(%w, %ids) <{operand_layout = ["weight", "indices"]}> : (tensor<9x4xf32>, !moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 4], f32>
    %heads = "aten.unsqueeze.default"(%x) <{dim = 1, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    // CHECK: [[MASK:%.*]] = "nn.attention_mask"(%arg1) <{causal = true}> : {{.*}} -> !moec.tensor<[batch, 1, seq, past + seq], i1>
    %mask = "nn.attention_mask"(%padding) <{causal = true}> : (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, 1, seq, seq], i1>
    // CHECK: [[FIRST:%.*]]:3 = "nn.attention"({{.*}}, [[MASK]], %arg2, %arg3)
    %first = "nn.attention"(%heads, %heads, %heads, %mask) <{operandSegmentSizes = [1, 1, 1, 1, 0, 0, 0], scale = 0.5}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, seq], i1>) -> !moec.tensor<[batch, seq, 1, 4], f32>
    %query = "aten.permute.default"(%first) <{dims = [0, 2, 1, 3], operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 1, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    // CHECK: [[SECOND:%.*]]:3 = "nn.attention"({{.*}}, [[MASK]], %arg2, %arg3)
    %second = "nn.attention"(%query, %heads, %heads, %mask) <{operandSegmentSizes = [1, 1, 1, 1, 0, 0, 0], scale = 0.5}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, seq], i1>) -> !moec.tensor<[batch, seq, 1, 4], f32>
    // CHECK: "func.return"([[SECOND]]#0, [[FIRST]]#1, [[FIRST]]#2)
    // CHECK: arg_names = ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    // CHECK-SAME: result_names = ["logits", "present.0.key", "present.0.value"]
    "func.return"(%second) : (!moec.tensor<[batch, seq, 1, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()

// -----

// Positions that are counted from the start of the input would be wrong behind a cache.
// EXPLAIN: add-kv-cache refused aten.arange.start_step
// CHECK: arg_names = ["input_ids"]
"builtin.module"() ({
  "func.func"() <{arg_names = ["input_ids"], function_type = (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 1, 4], f32>, result_names = ["logits"], sym_name = "main"}> ({
  ^bb0(%ids: !moec.tensor<[batch, seq], i64>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<9x4xf32>
    %where = "aten.arange.start_step"() <{dtype = i64, end = #moec.dim<seq>, start = 0, step = 1}> : () -> !moec.tensor<[seq], i64>
    %places = "aten.embedding.default"(%w, %where) <{operand_layout = ["weight", "indices"]}> : (tensor<9x4xf32>, !moec.tensor<[seq], i64>) -> !moec.tensor<[seq, 4], f32>
    %words = "aten.embedding.default"(%w, %ids) <{operand_layout = ["weight", "indices"]}> : (tensor<9x4xf32>, !moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 4], f32>
    %x = "aten.add.Tensor"(%words, %places) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[batch, seq, 4], f32>, !moec.tensor<[seq, 4], f32>) -> !moec.tensor<[batch, seq, 4], f32>
    %heads = "aten.unsqueeze.default"(%x) <{dim = 1, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    %padding = "aten.ones.default"() <{dtype = i64, size = [#moec.dim<batch>, #moec.dim<seq>]}> : () -> !moec.tensor<[batch, seq], i64>
    %mask = "nn.attention_mask"(%padding) <{causal = true}> : (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, 1, seq, seq], i1>
    %y = "nn.attention"(%heads, %heads, %heads, %mask) <{operandSegmentSizes = [1, 1, 1, 1, 0, 0, 0], scale = 0.5}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, seq], i1>) -> !moec.tensor<[batch, seq, 1, 4], f32>
    "func.return"(%y) : (!moec.tensor<[batch, seq, 1, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()

// -----

// So would a scale that grows with the length of the input.
// EXPLAIN: add-kv-cache refused aten.mul.Scalar: it computes with the number of tokens
// CHECK: arg_names = ["input_ids"]
"builtin.module"() ({
  "func.func"() <{arg_names = ["input_ids"], function_type = (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 1, 4], f32>, result_names = ["logits"], sym_name = "main"}> ({
  ^bb0(%ids: !moec.tensor<[batch, seq], i64>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<9x4xf32>
    %words = "aten.embedding.default"(%w, %ids) <{operand_layout = ["weight", "indices"]}> : (tensor<9x4xf32>, !moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 4], f32>
    %x = "aten.mul.Scalar"(%words) <{operand_layout = ["self"], other = #moec.dim<seq>}> : (!moec.tensor<[batch, seq, 4], f32>) -> !moec.tensor<[batch, seq, 4], f32>
    %heads = "aten.unsqueeze.default"(%x) <{dim = 1, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    %padding = "aten.ones.default"() <{dtype = i64, size = [#moec.dim<batch>, #moec.dim<seq>]}> : () -> !moec.tensor<[batch, seq], i64>
    %mask = "nn.attention_mask"(%padding) <{causal = true}> : (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, 1, seq, seq], i1>
    %y = "nn.attention"(%heads, %heads, %heads, %mask) <{operandSegmentSizes = [1, 1, 1, 1, 0, 0, 0], scale = 0.5}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, seq], i1>) -> !moec.tensor<[batch, seq, 1, 4], f32>
    "func.return"(%y) : (!moec.tensor<[batch, seq, 1, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()

// -----

// Values are narrower than keys: zeros make them as wide, and the result loses what they gave.
// CHECK: "past_key_values.0.value"
// CHECK-NOT: aten.constant_pad_nd
// WIDTHS: %arg1: !moec.tensor<[batch, 1, past, 4], f32>, %arg2: !moec.tensor<[batch, 1, past, 4], f32>
"builtin.module"() ({
  "func.func"() <{arg_names = ["input_ids"], function_type = (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 1, 3], f32>, result_names = ["logits"], sym_name = "main"}> ({
  ^bb0(%ids: !moec.tensor<[batch, seq], i64>):
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<9x4xf32>
    %x = "aten.embedding.default"(%w, %ids) <{operand_layout = ["weight", "indices"]}> : (tensor<9x4xf32>, !moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, seq, 4], f32>
    %keys = "aten.unsqueeze.default"(%x) <{dim = 1, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    %values = "aten.slice.Tensor"(%keys) <{dim = 3, end = 3, operand_layout = ["self"], start = 0}> : (!moec.tensor<[batch, 1, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 3], f32>
    %padding = "aten.ones.default"() <{dtype = i64, size = [#moec.dim<batch>, #moec.dim<seq>]}> : () -> !moec.tensor<[batch, seq], i64>
    %mask = "nn.attention_mask"(%padding) <{causal = true}> : (!moec.tensor<[batch, seq], i64>) -> !moec.tensor<[batch, 1, seq, seq], i1>
    // WIDTHS: [[WIDE:%.*]] = "aten.constant_pad_nd.default"({{.*}}) <{{{.*}}pad = [0, 1]{{.*}}}>
    // WIDTHS: [[Y:%.*]]:3 = "nn.attention"([[KEYS:%.*]], [[KEYS]], [[WIDE]], {{.*}}, %arg1, %arg2)
    // WIDTHS: [[CUT:%.*]] = "aten.slice.Tensor"([[Y]]#0) <{dim = 3, end = 3
    // WIDTHS: "func.return"([[CUT]], [[Y]]#1, [[Y]]#2)
    %y = "nn.attention"(%keys, %keys, %values, %mask) <{operandSegmentSizes = [1, 1, 1, 1, 0, 0, 0], scale = 0.5}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 3], f32>, !moec.tensor<[batch, 1, seq, seq], i1>) -> !moec.tensor<[batch, seq, 1, 3], f32>
    "func.return"(%y) : (!moec.tensor<[batch, seq, 1, 3], f32>) -> ()
  }) : () -> ()
}) : () -> ()
