// Options that say nothing are refused before anything runs; without calibration there is nothing to group by.
// RUN: not moec opt %s -p merge-experts 2>&1 | filecheck %s --check-prefix=MISSING
// RUN: not moec opt %s -p 'merge-experts{keep=0}' 2>&1 | filecheck %s --check-prefix=NONE
// RUN: not moec opt %s -p 'merge-experts{keep=2.5}' 2>&1 | filecheck %s --check-prefix=BROKEN
// RUN: not moec opt %s -p 'merge-experts{keep=nan}' 2>&1 | filecheck %s --check-prefix=NAN
// RUN: not moec opt %s -p 'merge-experts{keep=4 grouping=router-cos}' 2>&1 | filecheck %s --check-prefix=SPELLING
// RUN: not moec opt %s -p 'merge-experts{keep=4 time-limit=0}' 2>&1 | filecheck %s --check-prefix=TIME
// RUN: not moec opt %s -p 'merge-experts{keep=4}' 2>&1 | filecheck %s --check-prefix=ALONE

// MISSING: pass merge-experts needs the option keep
// NONE: keep = 0 leaves no experts
// BROKEN: keep = 2.5 is neither a number of experts nor a share of at most 1
// NAN: keep = nan leaves no experts
// SPELLING: 'router-cos' is no router-cosine|mean-output|weight|spectral|co-activation|facility
// SPELLING: did you mean 'router-cosine'?
// TIME: time-limit must be above 0
// ALONE: calibrate
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
