// RUN: not moec opt %s -p 'externalize{page=1000}' 2>&1 | filecheck %s --check-prefix=PAGE
// RUN: moec opt %s -p externalize | filecheck %s --check-prefix=NOTHING

// PAGE: page is a power of two
// NOTHING-NOT: moec.page_bytes
"builtin.module"() ({
  "func.func"() <{function_type = (tensor<4xf32>) -> tensor<4xf32>, sym_name = "main"}> ({
  ^bb0(%x: tensor<4xf32>):
    "func.return"(%x) : (tensor<4xf32>) -> ()
  }) : () -> ()
}) : () -> ()
