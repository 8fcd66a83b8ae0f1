// RUN: moec opt %s -p cse | filecheck %s
// RUN: moec opt %s -p cse --pass-statistics 2>&1 | filecheck %s --check-prefix=STATISTICS

// STATISTICS: cse (builtin.module)
// STATISTICS-NEXT: 3 merged

// CHECK-LABEL: "func.func"
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>), sym_name = "main"}> ({
  // CHECK: ^bb0([[X:%.*]]: tensor<4xf32>):
  ^bb0(%x: tensor<4xf32>):
    // CHECK-NEXT: [[W:%.*]] = "moec.weight"
    %w1 = "moec.weight"() <{source = "a", weight_name = "a"}> : () -> tensor<4xf32>
    %w2 = "moec.weight"() <{source = "a", weight_name = "a"}> : () -> tensor<4xf32>
    // Merging the weights makes the sums equal, and these the products.
    // CHECK-NEXT: [[SUM:%.*]] = "aten.add.Tensor"([[X]], [[W]])
    %a = "aten.add.Tensor"(%x, %w1) <{operand_layout = ["self", "other"]}> : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %b = "aten.add.Tensor"(%x, %w2) <{operand_layout = ["self", "other"]}> : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: [[P:%.*]] = "aten.mul.Tensor"([[SUM]]) <{{.*}}other = 2.0
    %p = "aten.mul.Tensor"(%a) <{operand_layout = ["self"], other = 2.0}> : (tensor<4xf32>) -> tensor<4xf32>
    %q = "aten.mul.Tensor"(%b) <{operand_layout = ["self"], other = 2.0}> : (tensor<4xf32>) -> tensor<4xf32>
    // A scale of 2 is an integer, not a float.
    // CHECK-NEXT: [[R:%.*]] = "aten.mul.Tensor"([[SUM]]) <{{.*}}other = 2}>
    %r = "aten.mul.Tensor"(%b) <{operand_layout = ["self"], other = 2}> : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: [[S:%.*]] = "aten.sub.Tensor"([[P]], [[P]])
    %s = "aten.sub.Tensor"(%p, %q) <{operand_layout = ["self", "other"]}> : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: "func.return"([[S]], [[R]])
    "func.return"(%s, %r) : (tensor<4xf32>, tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
