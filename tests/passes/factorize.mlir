// RUN: not moec opt %s -p factorize 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'factorize{experts=0}' 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'factorize{experts=4 partition=kmeans}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'factorize{experts=4}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: pass factorize needs the option experts
// NONE: experts must be at least 1
// SPELLING: did you mean 'k-means'?
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
