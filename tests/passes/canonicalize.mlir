// RUN: moec opt %s -p canonicalize | filecheck %s
// RUN: moec opt %s -p canonicalize --explain 2>&1 | filecheck %s --check-prefix=WHY

// CHECK-LABEL: "func.func"
"builtin.module"() ({
  "func.func"() <{function_type = (!moec.tensor<[batch, 6, 4], f32>) -> (!moec.tensor<[batch, 3, 8], f32>, !moec.tensor<[batch, 6, 4], f32>), sym_name = "main"}> ({
  // CHECK: ^bb0([[X:%.*]]: !moec.tensor<[batch, 6, 4], f32>):
  ^bb0(%x: !moec.tensor<[batch, 6, 4], f32>):
    // A copy is nothing, and two views are one reshape.
    // CHECK-NEXT: [[Y:%.*]] = "aten.reshape.default"([[X]]) <{operand_layout = ["self"], shape = [#moec.dim<batch>, 3, 8]}>
    %a = "aten.clone.default"(%x) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, 6, 4], f32>) -> !moec.tensor<[batch, 6, 4], f32>
    %b = "aten.view.default"(%a) <{operand_layout = ["self"], size = [#moec.dim<batch>, 24]}> : (!moec.tensor<[batch, 6, 4], f32>) -> !moec.tensor<[batch, 24], f32>
    %c = "aten.view.default"(%b) <{operand_layout = ["self"], size = [#moec.dim<batch>, 3, 8]}> : (!moec.tensor<[batch, 24], f32>) -> !moec.tensor<[batch, 3, 8], f32>
    // Adding zero turns -0.0 into 0.0.
    // CHECK-NEXT: [[Z:%.*]] = "aten.add.Tensor"([[X]])
    // WHY: canonicalize: {{.*}}canonicalize.mlir:{{[0-9]+}}:5: drop-neutral-operand refused aten.add.Tensor: x + 0 is not x where x is -0.0
    %d = "aten.add.Tensor"(%x) <{operand_layout = ["self"], other = 0}> : (!moec.tensor<[batch, 6, 4], f32>) -> !moec.tensor<[batch, 6, 4], f32>
    // CHECK-NEXT: "func.return"([[Y]], [[Z]])
    "func.return"(%c, %d) : (!moec.tensor<[batch, 3, 8], f32>, !moec.tensor<[batch, 6, 4], f32>) -> ()
  }) : () -> ()
}) : () -> ()
