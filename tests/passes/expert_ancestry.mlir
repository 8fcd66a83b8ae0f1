// Weights are needed, calibration is not.
// RUN: not moec opt %s -p expert-ancestry 2>&1 | filecheck %s

// CHECK: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
