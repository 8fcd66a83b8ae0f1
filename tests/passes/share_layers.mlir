// RUN: not moec opt %s -p 'share-layers{group=1}' 2>&1 | filecheck %s --check-prefix=ONE
// RUN: not moec opt %s -p 'share-layers{keep=all}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p share-layers 2>&1 | filecheck %s --check-prefix=ALONE

// ONE: group must be 0 or at least 2
// SPELLING: keep
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
