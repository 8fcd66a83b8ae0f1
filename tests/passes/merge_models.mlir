// RUN: not moec opt %s -p 'merge-models{start=1}' 2>&1 | filecheck %s --check-prefix=START
// RUN: not moec opt %s -p 'merge-models{method=slerp}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p merge-models 2>&1 | filecheck %s --check-prefix=ALONE

// START: start must be within 0..1
// SPELLING: method
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
