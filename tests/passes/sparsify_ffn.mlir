// RUN: not moec opt %s -p sparsify-ffn 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'sparsify-ffn{keep=1.5}' 2>&1 | filecheck %s --check-prefix=SHARE
// RUN: not moec opt %s -p 'sparsify-ffn{keep=0.5 kind=soft predictor-rank=2}' 2>&1 | filecheck %s --check-prefix=PREDICTOR
// RUN: not moec opt %s -p 'sparsify-ffn{keep=0.5}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: pass sparsify-ffn needs the option keep
// SHARE: keep 1.5 is not within (0, 1]
// PREDICTOR: a predictor ranks neurons, which only kind=top-k does
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
