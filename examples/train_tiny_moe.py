"""Trains a tiny Mixture-of-Experts language model on plain text files, on one CPU core.

    python examples/train_tiny_moe.py --text a.txt --text b.txt --heldout c.txt --minutes 20 -o my-moe

The result is an ordinary Hugging Face folder (Mixtral architecture, float32, byte-level BPE tokenizer). The model in
`examples/models/tiny-moe` was made this way, from six kinds of text and about 35 minutes of one core.

Every layer is balanced on its own: the load-balancing loss that is pooled over all layers can look perfect while
single layers send every token to two experts.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, one_hot, softmax
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """The recipe. Lengths are in tokens, `minutes` is CPU time, `steps` caps the number of steps if it is not 0."""

    minutes: float
    steps: int
    vocabulary: int = 4096
    hidden_size: int = 128
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    expert_width: int = 192
    window: int = 256
    batch: int = 8
    learning_rate: float = 2.5e-3
    balance: float = 0.03
    seed: int = 0


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer, so that every text can be written in its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (text[start : start + 5000] for text in texts for start in range(0, len(text), 5000))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Token ids of `text`, int64, with the end-of-text token in front."""
    return torch.tensor([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids])


def build_model(settings: Settings, vocabulary: int) -> MixtralForCausalLM:
    """A Mixtral model of the given size with random weights."""
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.expert_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 32,
        num_key_value_heads=settings.hidden_size // 64,
        head_dim=32,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        max_position_embeddings=4 * settings.window,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=settings.balance,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def imbalance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """The load-balancing loss of each layer, averaged over the layers; 1 for a perfectly even load.

    `router_logits`: one tensor [tokens, experts] per layer. The share of choices of an expert times the mean
    probability of that expert, summed over the experts and times their number (Switch Transformers, equation 4).
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        probability = softmax(logits.float(), dim=-1)
        chosen = one_hot(probability.topk(top_k, dim=-1).indices, experts).sum(1).float()
        losses.append(experts * (chosen.mean(0) / top_k * probability.mean(0)).sum())
    return torch.stack(losses).mean()


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Warm-up over 50 steps, constant, then a linear fall over the last quarter of the budget."""
    fall = min(1.0, (1.0 - progress) / 0.25)
    return settings.learning_rate * min(1.0, (step + 1) / 50) * max(0.03, fall)


def train(model: MixtralForCausalLM, streams: list[torch.Tensor], settings: Settings) -> int:
    """Trains in place on random windows, each text equally often. Returns the number of tokens seen."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    start, step, progress = time.process_time(), 0, 0.0
    model.train()
    while progress < 1.0:
        windows = []
        for _ in range(settings.batch):
            stream = streams[int(torch.randint(len(streams), (), generator=generator))]
            first = int(torch.randint(len(stream) - settings.window - 1, (), generator=generator))
            windows.append(stream[first : first + settings.window + 1])
        tokens = torch.stack(windows)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, progress)
        output = model(input_ids=tokens[:, :-1], output_router_logits=True)
        loss = cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        uneven = imbalance(output.router_logits, settings.top_k)
        optimizer.zero_grad(set_to_none=True)
        (loss + settings.balance * settings.top_k * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        progress = (time.process_time() - start) / (settings.minutes * 60)
        if settings.steps:
            progress = max(progress, step / settings.steps)
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, imbalance {uneven.item():.3f}", flush=True)
    return step * settings.batch * settings.window


@torch.no_grad()
def heldout_loss(model: MixtralForCausalLM, stream: torch.Tensor, window: int) -> float:
    """Mean loss in nats per token over consecutive windows of `stream`."""
    model.eval()
    count = (len(stream) - 1) // window
    inputs = stream[: count * window].view(count, window)
    targets = stream[1 : count * window + 1].view(count, window)
    total = 0.0
    for row_inputs, row_targets in zip(inputs.split(8), targets.split(8), strict=True):
        logits = model(input_ids=row_inputs, output_router_logits=False).logits
        total += cross_entropy(logits.flatten(0, 1), row_targets.flatten(), reduction="sum").item()
    return total / (count * window)


def main() -> None:
    """Reads the command line, trains, reports the held-out loss and saves."""
    parser = argparse.ArgumentParser(description="Train a tiny MoE language model on text files.")
    parser.add_argument("--text", type=Path, action="append", required=True, help="training text; may be repeated")
    parser.add_argument("--heldout", type=Path, required=True, help="text to measure the loss on")
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU minutes to train for")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps; 0: only by time")
    parser.add_argument("--vocabulary", type=int, default=Settings.vocabulary)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the model")
    arguments = parser.parse_args()
    settings = Settings(arguments.minutes, arguments.steps, vocabulary=arguments.vocabulary, seed=arguments.seed)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    model = build_model(settings, tokenizer.get_vocab_size())
    seen = train(model, [encode(tokenizer, text) for text in texts], settings)
    loss = heldout_loss(model, encode(tokenizer, arguments.heldout.read_text(encoding="utf-8")), settings.window)
    print(f"{seen} tokens seen; held-out loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}")
    model.config.use_cache = True
    model.save_pretrained(arguments.output)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT).save_pretrained(
        arguments.output
    )


if __name__ == "__main__":
    main()
