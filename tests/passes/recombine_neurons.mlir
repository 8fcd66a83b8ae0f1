// RUN: not moec opt %s -p recombine-neurons 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'recombine-neurons{keep=1.5}' 2>&1 | filecheck %s --check-prefix=BROKEN
// RUN: not moec opt %s -p 'recombine-neurons{keep=4 tau=1.5}' 2>&1 | filecheck %s --check-prefix=TAU
// RUN: not moec opt %s -p 'recombine-neurons{keep=4 start=first}' 2>&1 | filecheck %s --check-prefix=START

// MISSING: pass recombine-neurons needs the option keep
// BROKEN: keep = 1.5 is neither a number of experts nor a share of at most 1
// TAU: tau 1.5 is no cosine
// START: 'first' is no own|largest|random

// Without experts there is nothing to do.
// RUN: moec opt %s -p 'recombine-neurons{keep=4}' | filecheck %s
// CHECK: "func.return"(%arg0)
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
