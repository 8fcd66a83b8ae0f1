"""What transformers itself computes for a checkpoint, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from tests.parity.onnx_session import Ids, Logits, positions


@dataclass
class SourceModel:
    """A checkpoint loaded by transformers, with its plainest attention and experts."""

    model: PreTrainedModel
    is_encoder: bool

    @staticmethod
    def load(folder: Path, *, is_encoder: bool = False) -> SourceModel:
        config = AutoConfig.from_pretrained(folder)
        options: dict[str, Any] = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
        factory = AutoModel if is_encoder else AutoModelForCausalLM
        return SourceModel(factory.from_pretrained(folder, **options).eval(), is_encoder)

    def logits(self, ids: Ids, mask: Ids) -> Logits:
        """Logits [batch, seq, vocabulary] of whole sequences, padding on the left allowed."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        with torch.no_grad():
            return self.model(**tensors, use_cache=False).logits.numpy()

    def hidden(self, ids: Ids, mask: Ids, segments: Ids) -> Logits:
        """The last hidden state [batch, seq, hidden] of an encoder."""
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        with torch.no_grad():
            return self.model(**tensors).last_hidden_state.numpy()

    def expert_modules(self) -> list[torch.nn.Module]:
        """The modules that hold the stacked experts of each layer."""
        return [
            module
            for module in self.model.modules()
            if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)
        ]

    def used_experts(self, ids: Ids, mask: Ids) -> list[NDArray[np.int64]]:
        """The experts of each layer that at least one token of `ids` was sent to."""
        used: list[NDArray[np.int64]] = []

        def note(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            chosen = named.get("top_k_index", arguments[1] if len(arguments) > 1 else None)
            used.append(np.unique(chosen.numpy()[mask.reshape(-1).astype(bool)]))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self.expert_modules()]
        self.logits(ids, mask)
        for hook in hooks:
            hook.remove()
        return used

    def logits_without_expert(self, layer: torch.nn.Module, expert: int, ids: Ids, mask: Ids) -> Logits:
        """Logits with everything that one expert adds set to zero."""
        saved = {name: tensor.detach().clone() for name, tensor in layer.named_parameters() if name.startswith("down_")}
        parameters = dict(layer.named_parameters())
        with torch.no_grad():
            for name in saved:
                parameters[name][expert] = 0
            logits = self.logits(ids, mask)
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)
        return logits
