// RUN: moec opt %s -p raise-nn,dce | filecheck %s

"builtin.module"() ({
  // A norm whose weight is stored around zero, and one that sums instead of averaging, which is none.
  // CHECK-LABEL: sym_name = "norms"
  "func.func"() <{function_type = (!moec.tensor<[batch, seq, 8], f32>) -> (!moec.tensor<[batch, seq, 8], f32>, !moec.tensor<[batch, seq, 1], f32>), sym_name = "norms"}> ({
  ^bb0(%x: !moec.tensor<[batch, seq, 8], f32>):
    // CHECK: [[W:%.*]] = "moec.weight"
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<8xf32>
    %square = "aten.pow.Tensor_Scalar"(%x) <{exponent = 2, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 8], f32>) -> !moec.tensor<[batch, seq, 8], f32>
    %mean = "aten.mean.dim"(%square) <{dim = [-1], keepdim = true, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 8], f32>) -> !moec.tensor<[batch, seq, 1], f32>
    %shifted = "aten.add.Scalar"(%mean) <{operand_layout = ["self"], other = 1.0e-06}> : (!moec.tensor<[batch, seq, 1], f32>) -> !moec.tensor<[batch, seq, 1], f32>
    %root = "aten.rsqrt.default"(%shifted) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 1], f32>) -> !moec.tensor<[batch, seq, 1], f32>
    %normed = "aten.mul.Tensor"(%x, %root) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[batch, seq, 8], f32>, !moec.tensor<[batch, seq, 1], f32>) -> !moec.tensor<[batch, seq, 8], f32>
    %offset = "aten.add.Scalar"(%w) <{operand_layout = ["self"], other = 1.0}> : (tensor<8xf32>) -> tensor<8xf32>
    // CHECK: [[Y:%.*]] = "nn.rms_norm"(%arg0, [[W]]) <{epsilon = 1.0e-06, offset = 1.0, operandSegmentSizes = [1, 1]}>
    %y = "aten.mul.Tensor"(%normed, %offset) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[batch, seq, 8], f32>, tensor<8xf32>) -> !moec.tensor<[batch, seq, 8], f32>
    // CHECK: [[SUM:%.*]] = "aten.sum.dim_IntList"
    %sum = "aten.sum.dim_IntList"(%square) <{dim = [-1], keepdim = true, operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 8], f32>) -> !moec.tensor<[batch, seq, 1], f32>
    // CHECK-NEXT: "func.return"([[Y]], [[SUM]])
    "func.return"(%y, %sum) : (!moec.tensor<[batch, seq, 8], f32>, !moec.tensor<[batch, seq, 1], f32>) -> ()
  }) : () -> ()

  // The body of a feed-forward block is that of an expert.
  // CHECK-LABEL: sym_name = "feed_forward"
  "func.func"() <{function_type = (!moec.tensor<[batch, seq, 8], f32>) -> !moec.tensor<[batch, seq, 8], f32>, sym_name = "feed_forward"}> ({
  ^bb0(%x: !moec.tensor<[batch, seq, 8], f32>):
    // CHECK: [[UP:%.*]] = "moec.weight"
    %up = "moec.weight"() <{source = "up", weight_name = "up"}> : () -> tensor<24x8xf32>
    // CHECK-NEXT: [[DOWN:%.*]] = "moec.weight"
    %down = "moec.weight"() <{source = "down", weight_name = "down"}> : () -> tensor<8x24xf32>
    %wide = "aten.linear.default"(%x, %up) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[batch, seq, 8], f32>, tensor<24x8xf32>) -> !moec.tensor<[batch, seq, 24], f32>
    %active = "aten.relu.default"(%wide) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, seq, 24], f32>) -> !moec.tensor<[batch, seq, 24], f32>
    // CHECK-NEXT: [[MLP:%.*]] = "nn.mlp"(%{{.*}}, [[UP]], [[DOWN]])
    // CHECK-NEXT: ^bb0([[T:%.*]]: !moec.tensor<[tokens, 8], f32>
    // CHECK-NEXT: [[WIDE:%.*]] = "aten.linear.default"([[T]]
    // CHECK-NEXT: [[ACTIVE:%.*]] = "aten.relu.default"([[WIDE]])
    // CHECK-NEXT: [[OUT:%.*]] = "aten.linear.default"([[ACTIVE]]
    // CHECK-NEXT: "moe.yield"([[OUT]])
    %y = "aten.linear.default"(%active, %down) <{operand_layout = ["input", "weight"]}> : (!moec.tensor<[batch, seq, 24], f32>, tensor<8x24xf32>) -> !moec.tensor<[batch, seq, 8], f32>
    // CHECK: "func.return"([[MLP]])
    "func.return"(%y) : (!moec.tensor<[batch, seq, 8], f32>) -> ()
  }) : () -> ()
}) : () -> ()
