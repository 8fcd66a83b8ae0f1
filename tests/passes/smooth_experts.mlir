// RUN: not moec opt %s -p 'smooth-experts{alpha=1.5}' 2>&1 | filecheck %s --check-prefix=ALPHA
// RUN: not moec opt %s -p 'smooth-experts{aggregate=median}' 2>&1 | filecheck %s --check-prefix=MEDIAN
// RUN: not moec opt %s -p smooth-experts 2>&1 | filecheck %s --check-prefix=ALONE

// ALPHA: alpha 1.5 is not within 0..1
// MEDIAN: 'median' is no max|mean
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = () -> tensor<1xf32>, sym_name = "main"}> ({
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<1xf32>
    "func.return"(%w) : (tensor<1xf32>) -> ()
  }) : () -> ()
}) : () -> ()
