// RUN: not moec opt %s -p 'make-replicas{high=0.9 low=0.6}' 2>&1 | filecheck %s --check-prefix=ORDER
// RUN: not moec opt %s -p 'make-replicas{bits=9}' 2>&1 | filecheck %s --check-prefix=BITS
// RUN: not moec opt %s -p 'make-replicas{resident=0}' 2>&1 | filecheck %s --check-prefix=RESIDENT
// RUN: moec opt %s | filecheck %s --check-prefix=REPLICA

// ORDER: high 0.9 and low 0.6 are not 0 <= high <= low <= 1
// BITS: integers have 1 to 8 bits, not 9
// RESIDENT: resident 0 is not within (0, 1]
// REPLICA: "moe.replica"(%{{.*}}#0, %{{.*}}#1) <{high = 0.6, low = 1.0, outputs = 4}>
"builtin.module"() ({
  "func.func"() <{function_type = (!moec.tensor<[seq, 4], f32>) -> (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>), sym_name = "main"}> ({
  ^bb0(%logits: !moec.tensor<[seq, 4], f32>):
    %ids, %gates, %count = "moe.route"(%logits) <{operandSegmentSizes = [1, 0, 0, 0, 0, 0, 0, 0], routing = #moe.routing<k = 2>}> : (!moec.tensor<[seq, 4], f32>) -> (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>, !moec.tensor<[seq], i64>)
    %which, %weights = "moe.replica"(%ids, %gates) <{high = 0.6, low = 1.0, outputs = 4}> : (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>) -> (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>)
    "func.return"(%which, %weights) : (!moec.tensor<[seq, 2], i64>, !moec.tensor<[seq, 2], f32>) -> ()
  }) : () -> ()
}) : () -> ()
