"""Damages an artifact in ways that still load and run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray


@dataclass
class ArtifactEditor:
    """Changes weights inside an artifact folder."""

    folder: Path

    @property
    def data_file(self) -> Path:
        return self.folder / "onnx" / "model.onnx.data"

    def names(self) -> list[str]:
        """Names of all weights."""
        model = onnx.load(str(self.folder / "onnx" / "model.onnx"), load_external_data=False)
        return [tensor.name for tensor in model.graph.initializer]

    def place(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Offset in the data file and shape of the float32 tensor `name`."""
        model = onnx.load(str(self.folder / "onnx" / "model.onnx"), load_external_data=False)
        tensor = next(item for item in model.graph.initializer if item.name == name)
        assert tensor.data_type == onnx.TensorProto.FLOAT
        entries = {entry.key: entry.value for entry in tensor.external_data}
        return int(entries["offset"]), tuple(tensor.dims)

    def read(self, name: str) -> NDArray[np.float32]:
        offset, shape = self.place(name)
        flat = np.fromfile(self.data_file, np.float32, count=int(np.prod(shape)), offset=offset)
        return flat.reshape(shape)

    def write(self, name: str, values: NDArray[np.float32]) -> None:
        offset, shape = self.place(name)
        assert values.shape == shape and values.dtype == np.float32
        with self.data_file.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(values).tobytes())

    def swap(self, first: str, second: str) -> None:
        """Exchanges two tensors of equal shape."""
        kept = self.read(first)
        self.write(first, self.read(second))
        self.write(second, kept)

    def sign_again(self) -> None:
        """Brings the digests of the manifest up to date, so that only what the files say can be wrong."""
        path = self.folder / "moec.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name, record in manifest["files"].items():
            content = (self.folder / name).read_bytes()
            record["size"], record["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
