// RUN: moec opt %s -p expand-complex | filecheck %s
// RUN: moec opt %s -p expand-complex,raise-nn,dce | filecheck %s --check-prefix=ROTARY
// RUN: moec opt %s -p expand-complex --explain 2>&1 | filecheck %s --check-prefix=EXPLAIN

"builtin.module"() ({
  // CHECK-LABEL: sym_name = "rotary"
  // CHECK-NOT: complex
  // CHECK: "aten.cos.default"
  // CHECK: "aten.sin.default"
  // CHECK: "aten.select.int"({{.*}}) <{dim = -1, index = 0
  // CHECK: "aten.select.int"({{.*}}) <{dim = -1, index = 1
  // CHECK: "aten.sub.Tensor"
  // CHECK: "aten.add.Tensor"
  // CHECK: "aten.cat.default"
  // ROTARY-LABEL: sym_name = "rotary"
  // ROTARY: "nn.rotary"({{.*}}) <{interleaved = true
  "func.func"() <{function_type = (!moec.tensor<[batch, 2, seq, 4, 2], f32>, !moec.tensor<[batch, 1, seq, 4], f32>) -> !moec.tensor<[batch, 2, seq, 8], f32>, sym_name = "rotary"}> ({
  ^bb0(%pairs: !moec.tensor<[batch, 2, seq, 4, 2], f32>, %angles: !moec.tensor<[batch, 1, seq, 4], f32>):
    %flat = "aten.view.default"(%pairs) <{operand_layout = ["self"], size = [#moec.dim<batch>, 2, #moec.dim<seq>, 8]}> : (!moec.tensor<[batch, 2, seq, 4, 2], f32>) -> !moec.tensor<[batch, 2, seq, 8], f32>
    %again = "aten.view.default"(%flat) <{operand_layout = ["self"], size = [#moec.dim<batch>, 2, #moec.dim<seq>, 4, 2]}> : (!moec.tensor<[batch, 2, seq, 8], f32>) -> !moec.tensor<[batch, 2, seq, 4, 2], f32>
    %ones = "aten.ones_like.default"(%angles) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, 1, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], f32>
    %turn = "aten.polar.default"(%ones, %angles) <{operand_layout = ["abs", "angle"]}> : (!moec.tensor<[batch, 1, seq, 4], f32>, !moec.tensor<[batch, 1, seq, 4], f32>) -> !moec.tensor<[batch, 1, seq, 4], complex<f32>>
    %z = "aten.view_as_complex.default"(%again) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, 2, seq, 4, 2], f32>) -> !moec.tensor<[batch, 2, seq, 4], complex<f32>>
    %turned = "aten.mul.Tensor"(%z, %turn) <{operand_layout = ["self", "other"]}> : (!moec.tensor<[batch, 2, seq, 4], complex<f32>>, !moec.tensor<[batch, 1, seq, 4], complex<f32>>) -> !moec.tensor<[batch, 2, seq, 4], complex<f32>>
    %real = "aten.view_as_real.default"(%turned) <{operand_layout = ["self"]}> : (!moec.tensor<[batch, 2, seq, 4], complex<f32>>) -> !moec.tensor<[batch, 2, seq, 4, 2], f32>
    %y = "aten.view.default"(%real) <{operand_layout = ["self"], size = [#moec.dim<batch>, 2, #moec.dim<seq>, 8]}> : (!moec.tensor<[batch, 2, seq, 4, 2], f32>) -> !moec.tensor<[batch, 2, seq, 8], f32>
    "func.return"(%y) : (!moec.tensor<[batch, 2, seq, 8], f32>) -> ()
  }) : () -> ()

  // What has no real form keeps all of its function complex.
  // CHECK-LABEL: sym_name = "logarithm"
  // CHECK: "aten.view_as_complex.default"
  // EXPLAIN: aten.log.default: it works on complex tensors
  "func.func"() <{function_type = (tensor<4x2xf32>) -> tensor<4x2xf32>, sym_name = "logarithm"}> ({
  ^bb0(%x: tensor<4x2xf32>):
    %z = "aten.view_as_complex.default"(%x) <{operand_layout = ["self"]}> : (tensor<4x2xf32>) -> tensor<4xcomplex<f32>>
    %log = "aten.log.default"(%z) <{operand_layout = ["self"]}> : (tensor<4xcomplex<f32>>) -> tensor<4xcomplex<f32>>
    %y = "aten.view_as_real.default"(%log) <{operand_layout = ["self"]}> : (tensor<4xcomplex<f32>>) -> tensor<4x2xf32>
    "func.return"(%y) : (tensor<4x2xf32>) -> ()
  }) : () -> ()
}) : () -> ()
