// RUN: not moec opt %s -p 'protect-super-experts{percentile=101}' 2>&1 | filecheck %s --check-prefix=RANGE
// RUN: not moec opt %s -p protect-super-experts 2>&1 | filecheck %s --check-prefix=ALONE

// RANGE: percentile is within 0 to 100
// ALONE: pass protect-super-experts: {{.*}}calibrat
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
