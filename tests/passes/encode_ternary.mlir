// RUN: not moec opt %s -p 'encode-ternary{code-bits=3}' 2>&1 | filecheck %s --check-prefix=BITS
// RUN: not moec opt %s -p 'encode-ternary{zero-share=1}' 2>&1 | filecheck %s --check-prefix=SHARE
// RUN: not moec opt %s -p encode-ternary 2>&1 | filecheck %s --check-prefix=ALONE
// RUN: moec opt %s | filecheck %s --check-prefix=STREAM

// BITS: code-bits 3 is not within 4..16
// SHARE: zero-share 1 is not within (0, 1)
// ALONE: this pass reads weights, but the IR was given as text alone
// STREAM: "quant.dequant"({{.*}}) <{columns = 32, format = #quant.dictionary<code_bits = 8>, operandSegmentSizes = [1, 1, 0, 1, 1, 0]}> : (tensor<77xui8>, tensor<4x2xf32>, tensor<256x8xui8>, tensor<5xi32>) -> tensor<4x32xf32>
"builtin.module"() ({
  "func.func"() <{function_type = () -> tensor<4x32xf32>, sym_name = "main"}> ({
    %codes = "moec.weight"() <{source = "codes", weight_name = "codes"}> : () -> tensor<77xui8>
    %levels = "moec.weight"() <{source = "levels", weight_name = "levels"}> : () -> tensor<4x2xf32>
    %table = "moec.weight"() <{source = "table", weight_name = "table"}> : () -> tensor<256x8xui8>
    %offsets = "moec.weight"() <{source = "offsets", weight_name = "offsets"}> : () -> tensor<5xi32>
    %w = "quant.dequant"(%codes, %levels, %table, %offsets) <{columns = 32, format = #quant.dictionary<code_bits = 8>, operandSegmentSizes = [1, 1, 0, 1, 1, 0]}> : (tensor<77xui8>, tensor<4x2xf32>, tensor<256x8xui8>, tensor<5xi32>) -> tensor<4x32xf32>
    "func.return"(%w) : (tensor<4x32xf32>) -> ()
  }) : () -> ()
}) : () -> ()
