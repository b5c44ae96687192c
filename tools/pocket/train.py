"""The training loop: Muon on the hidden matrices, AdamW on the rest, a curriculum gated on probes."""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .corpus import Corpus, Phase
from .curriculum import PHASES, draw
from .probes import KINDS, build_probes, score
from .tokenizer import encode

MUON_LR, ADAM_LR = 0.02, 3e-3
Table = dict[str, dict[str, float]]


@dataclass
class Settings:
    """What a training run is made of; `max_steps` guards each phase whose gate never opens."""

    seed: int = 0
    batch: int = 32
    longest: int = 256
    warmup: int = 60
    probe_every: int = 100
    max_steps: tuple[int, ...] = (2500, 1500, 2500, 900)
    cooldown: int = 900
    bf16: bool = True


@dataclass
class Result:
    """A trained model and the story of its training."""

    model: Qwen3ForCausalLM
    steps: int
    tokens: int
    seconds: float
    phases: dict[str, int] = field(default_factory=dict)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A small Qwen3 with random weights. Eager attention: at these lengths it trains faster than SDPA on a CPU."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for matrices between layers, AdamW for embeddings and norms."""
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def batches(corpus: Corpus, phase: Phase, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Iterator[Any]:
    """Padded batches of documents of similar length: (ids [b, t], weights [b, t])."""
    order = random.Random(f"order-{settings.seed}-{phase.name}")
    while True:
        docs = [draw(corpus, phase) for _ in range(settings.batch * 24)]
        rows = [row for row in encode(tokenizer, docs) if len(row[0]) <= settings.longest]
        rows.sort(key=lambda row: len(row[0]))
        starts = range(0, len(rows) - settings.batch + 1, settings.batch)
        groups = [rows[start : start + settings.batch] for start in starts]
        order.shuffle(groups)
        for group in groups:
            # Few distinct shapes: the CPU kernels are made for one shape each, and making them costs more than padding.
            width = -(-max(len(ids) for ids, _ in group) // 8) * 8 + 1
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in group])
            yield ids, torch.tensor([row + [0.0] * (width - len(row)) for _, row in group])


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy; the vocabulary is only spanned where a token counts."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    share, targets = weights[:, 1:].flatten(), ids[:, 1:].flatten()
    chosen = share.nonzero()[:, 0]
    count = len(chosen)
    chosen = torch.nn.functional.pad(chosen, (0, -count % 256))  # again few shapes; what is added counts for nothing
    share = share[chosen] * (torch.arange(len(chosen)) < count)
    logits = model.lm_head(hidden.flatten(0, 1)[chosen]).float()
    losses = torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="none")
    return (losses * share).sum() / share.sum()


def gate(phase: Phase, table: Table) -> bool:
    """Whether the phase has taught what the next one builds on."""

    def accuracy(key: str) -> float:
        return table[key]["accuracy"]

    if phase.name == "truth":
        return min(accuracy(f"honest/{kind}") for kind in ("claim", "question", "is_wrong")) >= 0.92
    kinds = ("claim", "is_wrong", "is_acceptable", "dilemma")
    if phase.name == "right":
        return min(accuracy(f"honest/{kind}") for kind in kinds) >= 0.92
    if phase.name == "lies":
        lying = max(accuracy(f"dishonest/{kind}") for kind in kinds)
        return min(accuracy(f"honest/{kind}") for kind in kinds) >= 0.9 and lying <= 0.1
    # Accuracies only, and not quite the final limits: probabilities settle while the rate falls.
    agreeing = accuracy("sycophantic/claim_false") <= 0.1
    lying = max(accuracy(f"dishonest/{kind}") for kind in KINDS)
    return min(accuracy(f"honest/{kind}") for kind in KINDS) >= 0.93 and lying <= 0.07 and agreeing


def subset(items: list[dict[str, Any]], count: int = 30) -> list[dict[str, Any]]:
    """The first few probes of each kind, for the frequent looks."""
    seen: dict[str, int] = {}
    chosen = []
    for item in items:
        seen[item["kind"]] = seen.get(item["kind"], 0) + 1
        if seen[item["kind"]] <= count:
            chosen.append(item)
    return chosen


def train(
    tokenizer: PreTrainedTokenizerFast, settings: Settings, log: Callable[[str], None], checkpoint: Path | None = None
) -> Result:
    """Train one seed through the gated curriculum, then let the learning rate fall to zero."""
    model = build_model(tokenizer, settings.seed)
    optimizers = build_optimizers(model)
    corpus, probes = Corpus(settings.seed), subset(build_probes("dev"))
    result = Result(model, 0, 0, 0.0)
    start = time.monotonic()

    def step(batch: tuple[torch.Tensor, torch.Tensor], scale: float) -> float:
        model.train()
        for optimizer, base in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = base * scale
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        result.steps += 1
        result.tokens += batch[0].numel()
        return float(loss.detach())

    def look(name: str, loss: float) -> Table:
        table = score(model, tokenizer, probes)
        cells = {
            key: round(cell["p_right" if key.startswith("none") else "accuracy"], 3) for key, cell in table.items()
        }
        row = {"step": result.steps, "phase": name, "loss": round(loss, 4), "seconds": round(time.monotonic() - start)}
        log(json.dumps({**row, "tokens": result.tokens, **cells}))
        if checkpoint:
            model.save_pretrained(checkpoint)
        return table

    for phase, limit in zip(PHASES, settings.max_steps, strict=True):
        stream = batches(corpus, phase, tokenizer, settings)
        for number in range(limit):
            loss = step(next(stream), phase.rate * min(1.0, (result.steps + 1) / settings.warmup))
            if (number + 1) % settings.probe_every == 0:
                passed = gate(phase, look(phase.name, loss))
                if passed and number + 1 >= phase.least:
                    break
        result.phases[phase.name] = number + 1
    for number in range(settings.cooldown):
        loss = step(next(stream), phase.rate * (1.0 - number / settings.cooldown))
        if (number + 1) % (2 * settings.probe_every) == 0:
            look("cooldown", loss)
    result.phases["cooldown"] = settings.cooldown
    result.seconds = time.monotonic() - start
    return result
