// What a plan needs, and options that make no sense.
// RUN: not moec opt %s -p 'solve-budget{bytes=50%}' 2>&1 | filecheck %s --check-prefix=BARE
// RUN: not moec opt %s -p solve-budget 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'solve-budget{bytes=110%}' 2>&1 | filecheck %s --check-prefix=MUCH
// RUN: not moec opt %s -p 'solve-budget{bytes=5furlongs}' 2>&1 | filecheck %s --check-prefix=UNIT
// RUN: not moec opt %s -p 'solve-budget{bytes=50% flops=2GiB}' 2>&1 | filecheck %s --check-prefix=FLOPS
// RUN: not moec opt %s -p 'solve-budget{bytes=50% refit distortion=fisher}' 2>&1 | filecheck %s --check-prefix=NORM
// RUN: not moec opt %s -p apply-plan 2>&1 | filecheck %s --check-prefix=PLAN

// BARE: this pass needs statistics, but the model was not calibrated
// NONE: needs the option bytes
// MUCH: 110% is not within 0% to 100%
// UNIT: '5furlongs' is no budget
// FLOPS: flops 2GiB is no share
// NORM: refit needs a distortion that is a norm of outputs, which fisher is not
// PLAN: there is no plan
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
