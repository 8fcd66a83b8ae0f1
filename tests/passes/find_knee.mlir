// RUN: not moec opt %s -p 'find-knee{step=1}' 2>&1 | filecheck %s --check-prefix=STEP
// RUN: not moec opt %s -p 'find-knee{tolerance=-1}' 2>&1 | filecheck %s --check-prefix=TOLERANCE
// RUN: not moec opt %s -p 'find-knee{sequences=0}' 2>&1 | filecheck %s --check-prefix=SEQUENCES
// RUN: not moec opt %s -p find-knee 2>&1 | filecheck %s --check-prefix=ALONE

// STEP: step 1 is not within 0 < step < 1
// TOLERANCE: tolerance must not be negative
// SEQUENCES: sequences must be at least 1
// ALONE: pass find-knee: {{.*}}not calibrated
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
