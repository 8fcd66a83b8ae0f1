// Options that cannot be are refused before anything runs; without calibration there is nothing to rank by.
// RUN: not moec opt %s -p 'prune-experts{ratio=1}' 2>&1 | filecheck %s --check-prefix=ALL
// RUN: not moec opt %s -p 'prune-experts{criterion=reap}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'prune-experts{scope=global keep=4}' 2>&1 | filecheck %s --check-prefix=GLOBAL
// RUN: not moec opt %s -p prune-experts 2>&1 | filecheck %s --check-prefix=ALONE

// ALL: ratio 1.0 is not within 0 to below 1
// SPELLING: 'reap' is no frequency|gate-mass|
// SPELLING: did you mean 'reap-
// GLOBAL: scope=global takes a ratio
// ALONE: pass prune-experts: {{.*}}calibrat
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
