// RUN: not moec opt %s -p 'refit-down{ridge=0}' 2>&1 | filecheck %s --check-prefix=RIDGE
// RUN: not moec opt %s -p 'refit-down{hold-out=1}' 2>&1 | filecheck %s --check-prefix=HELD
// RUN: not moec opt %s -p 'refit-down{ridge=0.1,-1}' 2>&1 | filecheck %s --check-prefix=RIDGE
// RUN: not moec opt %s -p 'refit-down{sweeps=0}' 2>&1 | filecheck %s --check-prefix=SWEEPS
// RUN: not moec opt %s -p 'refit-down{scope=both}' 2>&1 | filecheck %s --check-prefix=SCOPE
// RUN: not moec opt %s -p refit-down 2>&1 | filecheck %s --check-prefix=ALONE

// RIDGE: each ridge must be above 0
// HELD: hold-out 1 is not within 0 < hold-out < 1
// SWEEPS: sweeps must be at least 1
// SCOPE: 'both' is no auto|joint|expert
// ALONE: calibrate
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
