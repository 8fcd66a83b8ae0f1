// Without a model there is nothing to run, and the IR is as it was.
// RUN: not moec opt %s -p calibrate 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: not moec opt %s -p 'calibrate{sequences=0}' 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'calibrate{precision=float16}' 2>&1 | filecheck %s --check-prefix=HALF

// ALONE: pass calibrate: there is no model to run
// ALONE: name it with --source
// NONE: sequences must be at least 1
// HALF: 'float16' is no float32|float64
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
