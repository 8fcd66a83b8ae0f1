"""From the matrices of experts to the formats that kernels read, or a refusal with the reason."""

from __future__ import annotations

from moec.codegen.triton.packing import CodedMatrix
from moec.codegen.triton.spec import FLOAT
from moec.errors import UnsupportedModelError
from moec.experts import Dense, Matrix


def code_matrix(matrix: Matrix, where: str) -> CodedMatrix:
    """The matrix for kernels. Raises UnsupportedModelError for a kind or a format that they do not read."""
    if isinstance(matrix, Dense):
        return CodedMatrix(FLOAT, matrix.weight)
    raise UnsupportedModelError(
        f"the Triton backend has no kernel for matrices of experts that are {type(matrix).__name__}",
        where=where,
        hint="emit ONNX, or leave these experts as they were",
    )
