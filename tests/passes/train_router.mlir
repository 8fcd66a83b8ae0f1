// RUN: not moec opt %s -p 'train-router{labels=pa}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'train-router{rate=0}' 2>&1 | filecheck %s --check-prefix=RANGE
// RUN: not moec opt %s -p 'train-router' 2>&1 | filecheck %s --check-prefix=WEIGHTS

// SPELLING: 'pa' is no activation|nearest|best-subset
// RANGE: rate must be within 0 and 1
// WEIGHTS: this pass reads weights
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
