// RUN: not moec opt %s -p fold-norms 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: not moec opt %s -p 'fold-norms{to=layer}' 2>&1 | filecheck %s --check-prefix=TARGET
// RUN: moec opt %s | filecheck %s --check-prefix=SHORT

// ALONE: this pass reads weights, but the IR was given as text alone
// TARGET: layer
// SHORT: "nn.rms_norm"(%arg0) <{epsilon = 1.0e-06, operandSegmentSizes = [1, 0], zero_sum = true}>
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4x7xf32>) -> tensor<4x7xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4x7xf32>):
    %y = "nn.rms_norm"(%x) <{epsilon = 1.0e-06, operandSegmentSizes = [1, 0], zero_sum = true}> : (tensor<4x7xf32>) -> tensor<4x7xf32>
    "func.return"(%y) : (tensor<4x7xf32>) -> ()
  }) : () -> ()
}) : () -> ()
