// RUN: not moec opt %s -p structure-linear 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'structure-linear{rank=2 ratio=0.5}' 2>&1 | filecheck %s --check-prefix=BOTH
// RUN: not moec opt %s -p 'structure-linear{rank=2 guide=2}' 2>&1 | filecheck %s --check-prefix=GUIDE
// RUN: not moec opt %s -p 'structure-linear{rank=2}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: give a rank or a ratio
// BOTH: rank and ratio exclude each other
// GUIDE: guide 2 is not within [0, 1]
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
