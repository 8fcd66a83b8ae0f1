// RUN: not moec opt %s -p 'init-router{kind=lsq}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'init-router{deviation=0}' 2>&1 | filecheck %s --check-prefix=RANGE

// SPELLING: 'lsq' is no random|frozen-random|group|weight-centroid|activation-centroid|least-squares|representative-neuron|
// RANGE: deviation and prior must be positive
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
