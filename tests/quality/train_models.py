"""Trains the two small mixtures of experts that the quality tests measure on, on one CPU core.

    python -m tests.quality.train_models scratch    # 16 experts from random weights
    python -m tests.quality.train_models upcycled   # a dense model, its FFN copied 16 times, trained on

Both are byte-level Mixtral models that learn the source text of Python's standard library. An interrupted run goes on
where it last saved its state (`--state FOLDER`). The losses of compression methods come in another order on the two:
experts from scratch have nothing in common, upcycled ones are near copies of each other.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy, one_hot, softmax
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from tests.quality.corpus import slice_path, training_text

MODELS = Path(__file__).parent / "models"
EXPERTS, TOP_K, WIDTH, HIDDEN, LAYERS, WINDOW, BATCH = 16, 2, 64, 64, 3, 128, 16
BALANCE = 0.02


@dataclass(frozen=True)
class Stage:
    """Some optimizer steps of a model with `experts` experts per layer; over the last share `fall` the rate falls."""

    name: str
    experts: int
    steps: int
    learning_rate: float
    fall: float
    seed: int


STAGES: dict[str, tuple[Stage, ...]] = {
    "scratch": (Stage("scratch", EXPERTS, 830, 5e-3, 0.5, seed=1),),
    "upcycled": (
        Stage("dense", 1, 300, 5e-3, 0.0, seed=2),
        Stage("upcycled", EXPERTS, 815, 1.2e-3, 0.5, seed=3),
    ),
}


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, whose id is the byte."""
    letters = _letters_of_bytes()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters_of_bytes() -> list[str]:
    """The letter by which byte-level tokenizers write each byte: its own if it is visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(spare)) for byte in range(256)]


def build_model(experts: int) -> MixtralForCausalLM:
    """A Mixtral model with random weights; with one expert it is a dense model."""
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HIDDEN // 4,
        num_local_experts=experts,
        num_experts_per_tok=min(experts, TOP_K),
        max_position_embeddings=4 * WINDOW,
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def copy_experts(dense: MixtralForCausalLM, seed: int) -> MixtralForCausalLM:
    """The model in which each FFN of `dense` stands 16 times, behind a router with random weights."""
    torch.manual_seed(seed)
    model = build_model(EXPERTS)
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        if ".experts." in name:
            state[name] = tensor.expand(EXPERTS, *tensor.shape[1:]).clone()
        elif not name.endswith("mlp.gate.weight"):
            state[name] = tensor
    model.load_state_dict(state)
    return model


def imbalance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Load-balancing loss of each layer, averaged over the layers: 1 for an even load.

    Layer by layer, because the loss over pooled layers can look perfect while single layers collapse.
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        probability = softmax(logits, dim=-1)
        chosen = one_hot(probability.topk(min(experts, TOP_K), dim=-1).indices, experts).sum(1).float()
        losses.append(experts * (chosen.mean(0) / min(experts, TOP_K) * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(stage: Stage, step: int) -> float:
    """Warm-up over 40 steps, constant, then a linear fall to a fiftieth."""
    falling = stage.steps * stage.fall
    share = min(1.0, (stage.steps - step) / falling) if falling else 1.0
    return stage.learning_rate * min(1.0, (step + 1) / 40) * max(0.02, share)


def train(model: MixtralForCausalLM, text: torch.Tensor, stage: Stage, state: Path) -> None:
    """Trains in place on random windows of `text`, int64 [bytes]; every 50 steps the state goes to a file."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.95))
    first = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    model.train()
    for step in range(first, stage.steps):
        generator = torch.Generator().manual_seed(stage.seed * 1_000_000 + step)
        starts = torch.randint(len(text) - WINDOW - 1, (BATCH, 1), generator=generator)
        tokens = text[starts + torch.arange(WINDOW + 1)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        output = model(input_ids=tokens[:, :-1], output_router_logits=True)
        loss = cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        uneven = imbalance(output.router_logits)
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            print(f"{stage.name} step {step + 1}: loss {loss.item():.4f}, imbalance {uneven.item():.3f}", flush=True)
            part = state.with_suffix(".part")
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
            part.replace(state)


@torch.no_grad()
def heldout_loss(model: MixtralForCausalLM, sequences: int = 160, length: int = 64) -> float:
    """Mean loss in nats per byte over windows spread evenly over the held-out slice."""
    model.eval()
    text = torch.tensor(list(slice_path("heldout").read_bytes()))
    starts = torch.linspace(0, len(text) - length - 1, sequences).long()[:, None]
    tokens = text[starts + torch.arange(length + 1)]
    logits = model(input_ids=tokens[:, :-1]).logits.double()
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def save(model: MixtralForCausalLM, folder: Path) -> None:
    """Saves a Hugging Face folder in bfloat16, without what only training needs."""
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(folder)


def main() -> None:
    """Reads the command line, trains the stages of a model, reports their held-out losses and saves the last."""
    parser = argparse.ArgumentParser(description="Train a model for the quality tests.")
    parser.add_argument("model", choices=sorted(STAGES))
    parser.add_argument("--state", type=Path, default=Path("build/quality-training"), help="folder for unfinished runs")
    parser.add_argument(
        "-o", "--output", type=Path, default=MODELS, help="folder that gets a folder of the model's name"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.state.mkdir(parents=True, exist_ok=True)
    text = torch.frombuffer(bytearray(training_text()), dtype=torch.uint8).long()
    model: MixtralForCausalLM | None = None
    losses: dict[str, float] = {}
    for stage in STAGES[arguments.model]:
        torch.manual_seed(stage.seed)
        model = build_model(stage.experts) if model is None else copy_experts(model, stage.seed)
        train(model, text, stage, arguments.state / f"{stage.name}.pt")
        losses[stage.name] = heldout_loss(model)
    assert model is not None
    save(model, arguments.output / arguments.model)
    losses["saved"] = heldout_loss(MixtralForCausalLM.from_pretrained(arguments.output / arguments.model).float())
    print(json.dumps({name: round(loss, 4) for name, loss in losses.items()}), math.isfinite(losses["saved"]))


if __name__ == "__main__":
    main()
