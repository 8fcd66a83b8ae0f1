// RUN: not moec opt %s -p 'tune{train=head}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'tune{steps=0}' 2>&1 | filecheck %s --check-prefix=RANGE
// RUN: not moec opt %s -p 'tune' 2>&1 | filecheck %s --check-prefix=SOURCE

// SPELLING: 'head' is no router|routed|all
// RANGE: steps must be at least 1
// SOURCE: only decoders from a folder can be tuned
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
