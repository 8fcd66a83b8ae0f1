"builtin.module"() ({
  "func.func"() <{function_type = () -> (tensor<4x32xf32>, tensor<4x40xf32>, tensor<4x32xf32>, tensor<4x32xf32>, tensor<4x32xf32>, tensor<4x32xf32>), sym_name = "main"}> ({
    %ac = "moec.weight"() <{source = "ac", weight_name = "ac"}> : () -> tensor<4x12xui8>
    %as = "moec.weight"() <{source = "as", weight_name = "as"}> : () -> tensor<4x2xf16>
    %az = "moec.weight"() <{source = "az", weight_name = "az"}> : () -> tensor<4x1xui8>
    %a = "quant.dequant"(%ac, %as, %az) <{columns = 32, format = #quant.integer<bits = 3, group = 16, span = #quant.span<group>, zero_point = #quant.zero_point<integer>>, operandSegmentSizes = [1, 1, 1, 0, 0, 0]}> : (tensor<4x12xui8>, tensor<4x2xf16>, tensor<4x1xui8>) -> tensor<4x32xf32>
    %bc = "moec.weight"() <{source = "bc", weight_name = "bc"}> : () -> tensor<4x8xui8>
    %bs = "moec.weight"() <{source = "bs", weight_name = "bs"}> : () -> tensor<4x2xf32>
    %b = "quant.dequant"(%bc, %bs) <{columns = 40, format = #quant.ternary<levels = #quant.levels<extremes>, packing = #quant.trits<five_per_byte>>, operandSegmentSizes = [1, 1, 0, 0, 0, 0]}> : (tensor<4x8xui8>, tensor<4x2xf32>) -> tensor<4x40xf32>
    %cc = "moec.weight"() <{source = "cc", weight_name = "cc"}> : () -> tensor<4x16xui8>
    %cs = "moec.weight"() <{source = "cs", weight_name = "cs"}> : () -> tensor<1x1xbf16>
    %ct = "moec.weight"() <{source = "ct", weight_name = "ct"}> : () -> tensor<16x1xf32>
    %c = "quant.dequant"(%cc, %cs, %ct) <{columns = 32, format = #quant.codebook<bits = 4, span = #quant.span<tensor>>, operandSegmentSizes = [1, 1, 0, 1, 0, 0]}> : (tensor<4x16xui8>, tensor<1x1xbf16>, tensor<16x1xf32>) -> tensor<4x32xf32>
    %dc = "moec.weight"() <{source = "dc", weight_name = "dc"}> : () -> tensor<4x16xui8>
    %ds = "moec.weight"() <{source = "ds", weight_name = "ds"}> : () -> tensor<4x1xui8>
    %d = "quant.dequant"(%dc, %ds) <{columns = 32, format = #quant.block_float<>, operandSegmentSizes = [1, 1, 0, 0, 0, 0]}> : (tensor<4x16xui8>, tensor<4x1xui8>) -> tensor<4x32xf32>
    %ec = "moec.weight"() <{source = "ec", weight_name = "ec"}> : () -> tensor<4x16xui8>
    %es = "moec.weight"() <{source = "es", weight_name = "es"}> : () -> tensor<4x2xui8>
    %et = "moec.weight"() <{source = "et", weight_name = "et"}> : () -> tensor<1xf32>
    %e = "quant.dequant"(%ec, %es, %et) <{columns = 32, format = #quant.block_float<block = 16, scale = #quant.block_scale<e4m3>>, operandSegmentSizes = [1, 1, 0, 0, 0, 1]}> : (tensor<4x16xui8>, tensor<4x2xui8>, tensor<1xf32>) -> tensor<4x32xf32>
    %fc = "moec.weight"() <{source = "fc", weight_name = "fc"}> : () -> tensor<77xui8>
    %fs = "moec.weight"() <{source = "fs", weight_name = "fs"}> : () -> tensor<4x2xf32>
    %ft = "moec.weight"() <{source = "ft", weight_name = "ft"}> : () -> tensor<256x8xui8>
    %fo = "moec.weight"() <{source = "fo", weight_name = "fo"}> : () -> tensor<5xi32>
    %f = "quant.dequant"(%fc, %fs, %ft, %fo) <{columns = 32, format = #quant.dictionary<code_bits = 8>, operandSegmentSizes = [1, 1, 0, 1, 1, 0]}> : (tensor<77xui8>, tensor<4x2xf32>, tensor<256x8xui8>, tensor<5xi32>) -> tensor<4x32xf32>
    "func.return"(%a, %b, %c, %d, %e, %f) : (tensor<4x32xf32>, tensor<4x40xf32>, tensor<4x32xf32>, tensor<4x32xf32>, tensor<4x32xf32>, tensor<4x32xf32>) -> ()
  }) : () -> ()
}) : () -> ()
