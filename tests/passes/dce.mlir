// RUN: moec opt %s -p dce | filecheck %s
// RUN: moec opt %s -p 'func.func(dce)' | filecheck %s

// CHECK-LABEL: "func.func"
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>, tensor<2xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  // An argument that nobody reads stays.
  // CHECK: ^bb0(%arg0: tensor<4xf32>, %arg1: tensor<2xf32>):
  ^bb0(%x: tensor<4xf32>, %unused: tensor<2xf32>):
    // A dead chain goes as a whole.
    // CHECK-NOT: moec.weight
    // CHECK-NOT: aten.mul.Tensor
    %w = "moec.weight"() <{source = "a", weight_name = "a"}> : () -> tensor<4xf32>
    %dead = "aten.mul.Tensor"(%x, %w) <{operand_layout = ["self", "other"]}> : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
    %deader = "aten.neg.default"(%dead) <{operand_layout = ["self"]}> : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK: [[Y:%.*]] = "aten.abs.default"(%arg0)
    %y = "aten.abs.default"(%x) <{operand_layout = ["self"]}> : (tensor<4xf32>) -> tensor<4xf32>
    // CHECK-NEXT: "func.return"([[Y]])
    "func.return"(%y) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
