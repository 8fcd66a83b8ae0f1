"""Packed weights in ONNX: decoded by standard operators, or handed to operators that take them packed.

Reading order: `matrix` (a packed matrix and its operands), `decode` and `decode_stream` (the numbers of any format by
ai.onnx operators), `kernel_form`, `rearrange` and `kernel` (com.microsoft::MatMulNBits).
"""
