// RUN: not moec opt %s -p 'align-router{bits=1}' 2>&1 | filecheck %s --check-prefix=BITS
// RUN: not moec opt %s -p 'align-router{steps=0}' 2>&1 | filecheck %s --check-prefix=STEPS
// RUN: not moec opt %s -p 'align-router{method=clip top-share=2}' 2>&1 | filecheck %s --check-prefix=SHARE
// RUN: moec opt %s -p align-router | filecheck %s --check-prefix=NOTHING

// BITS: bits 1 is not within 2..8
// STEPS: steps must be at least 1
// SHARE: top-share must be within 0..1
// NOTHING: "moec.weight"() <{source = "w", weight_name = "w"}>
"builtin.module"() ({
  "func.func"() <{function_type = () -> tensor<1xf32>, sym_name = "main"}> ({
    %w = "moec.weight"() <{source = "w", weight_name = "w"}> : () -> tensor<1xf32>
    "func.return"(%w) : (tensor<1xf32>) -> ()
  }) : () -> ()
}) : () -> ()
