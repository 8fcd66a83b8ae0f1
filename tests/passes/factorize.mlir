// RUN: not moec opt %s -p factorize 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'factorize{experts=0}' 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'factorize{experts=4 partition=kmeans}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'factorize{experts=4}' 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: not moec opt %s -p 'factorize{experts=4 partition=domain-masks shared=8}' 2>&1 | filecheck %s --check-prefix=MASKS
// RUN: not moec opt %s -p 'factorize{experts=4 target=experts shared=8}' 2>&1 | filecheck %s --check-prefix=FINER
// RUN: not moec opt %s -p 'factorize{experts=2 target=attention-heads partition=domain-masks}' 2>&1 | filecheck %s --check-prefix=HEADS

// MISSING: pass factorize needs the option experts
// NONE: experts must be at least 1
// SPELLING: did you mean 'k-means'?
// MASKS: partition=domain-masks shares what all experts have, not a number of neurons
// FINER: target=experts takes a partition, without shared neurons
// HEADS: target=attention-heads takes a partition, without shared neurons
// ALONE: this pass reads weights, but the IR was given as text alone
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
