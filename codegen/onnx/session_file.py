"""How a model wants to be loaded: `session.json` beside it, and its weights as the compiling machine packs them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moec.errors import MoecError
from moec.weights.json_file import read_json_object

SESSION_FILE = "session.json"
PREPACKED_FOLDER = "prepacked"
_EXTERNAL = "model.onnx.data"
_LEAST_BYTES = 1024


@dataclass(frozen=True)
class SessionFacts:
    """`options` are entries for SessionOptions.add_session_config_entry; `prepacked` is a model, relative to the folder
    of the file, that has the same results and loads without copying weights, on machines with the same instructions;
    empty where there is none. `prepacked_bytes` is what it takes on disk."""

    options: dict[str, str]
    prepacked: str = ""
    prepacked_bytes: int = 0


def write_session_file(folder: Path, facts: SessionFacts) -> None:
    """Writes the file into `folder`."""
    (folder / SESSION_FILE).write_text(json.dumps(asdict(facts), indent=2) + "\n", encoding="utf-8")


def read_session_file(folder: Path) -> SessionFacts:
    """What the file in `folder` says; nothing where there is none."""
    path = folder / SESSION_FILE
    if not path.is_file():
        return SessionFacts({})
    found = read_json_object(path)
    options = found.get("options")
    prepacked = str(found.get("prepacked") or "")
    if not isinstance(options, dict) or prepacked not in ("", f"{PREPACKED_FOLDER}/model.onnx"):
        raise MoecError("it does not say how to load the model", where=str(path), hint="compile again")
    return SessionFacts({str(key): str(value) for key, value in options.items()}, prepacked)


def save_prepacked(model: Path) -> int:
    """Writes the model and its weights as ONNX Runtime holds them once it is loaded; returns the bytes on disk.

    Loading that copies nothing: the kernels' own layouts are mapped from the file. They suit the instructions of this
    machine, and ONNX Runtime packs anew where it finds others.
    """
    import onnxruntime

    folder = model.parent / PREPACKED_FOLDER
    folder.mkdir()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.optimized_model_filepath = str(folder / model.name)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": _EXTERNAL,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_LEAST_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return sum(path.stat().st_size for path in folder.iterdir())
