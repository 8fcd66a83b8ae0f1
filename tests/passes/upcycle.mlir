// RUN: not moec opt %s -p 'upcycle{experts=-1}' 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'upcycle{rest=average}' 2>&1 | filecheck %s --check-prefix=ONE
// RUN: not moec opt %s -p 'upcycle{sources=all experts=4}' 2>&1 | filecheck %s --check-prefix=EACH
// RUN: not moec opt %s -p 'upcycle{granularity=4 k=6}' 2>&1 | filecheck %s --check-prefix=PARTS
// RUN: not moec opt %s -p 'upcycle{experts=2 k=3}' 2>&1 | filecheck %s --check-prefix=MANY
// RUN: not moec opt %s -p 'upcycle{deviation=0}' 2>&1 | filecheck %s --check-prefix=TIES
// RUN: not moec opt %s -p 'upcycle{every=2 layers=1}' 2>&1 | filecheck %s --check-prefix=BOTH
// RUN: not moec opt %s -p upcycle 2>&1 | filecheck %s --check-prefix=ALONE

// NONE: experts must not be negative
// ONE: rest=average needs sources=all or sources=others
// EACH: each gives one expert, so experts cannot be chosen
// PARTS: k = 6 is no multiple of granularity 4: parts of a copy would be chosen
// MANY: 3 experts cannot be chosen among 2
// TIES: a router of zeros cannot tell groups apart
// BOTH: every and layers exclude each other
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
