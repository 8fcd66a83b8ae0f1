// RUN: not moec opt %s -p 'plan-cache{capacity=0}' 2>&1 | filecheck %s --check-prefix=CAPACITY
// RUN: not moec opt %s -p plan-cache 2>&1 | filecheck %s --check-prefix=ALONE

// CAPACITY: capacity is above 0 and at most 1
// ALONE: pass plan-cache: {{.*}}calibrat
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
