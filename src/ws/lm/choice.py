"""Choice scoring: how much probability a model puts on each of a few answers at the next token.

`logP(c) = logsumexp` over every vocabulary token that decodes to the choice, in any case and with leading white space,
from a float32 log-softmax at the answer position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.console import progress
from ws.errors import WsError
from ws.lm.batches import in_groups, packed_logits, row_logits, takes_masks, with_batch_size
from ws.lm.models import encode

START_BATCH = 64
Choice = str | tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of `n` prompts over `k` choices.

    Attributes:
        choices: the `k` answers.
        logp: natural-log probabilities, `[n, k]`, in the order of the prompts.
        variants: probabilities of the `m` tokens that read as a choice, `[n, m]`, choice after choice.
    """

    choices: tuple[str, ...]
    logp: Float[np.ndarray, "n k"]
    variants: Float[np.ndarray, "n m"]

    @classmethod
    def checked(cls, choices: Sequence[Choice], logp: Float[Tensor, "n k_and_m"]) -> ChoiceScores:
        """Scores on the CPU in double precision, of what `with_each_token` lists; `WsError` when the model gave NaN."""
        values = logp.cpu().double().numpy()
        if np.isnan(values).any():
            raise WsError("The model gave NaN probabilities; its weights or the steering strength are broken.")
        names = tuple(words[0] for words in map(_words, choices))
        return cls(names, values[:, : len(names)], np.exp(values[:, len(names) :]))

    @property
    def mass(self) -> Float[np.ndarray, "n"]:
        """`pmass`: the probability of any of the choices, in [0, 1]; under 0.9 the score says little."""
        return np.exp(self.logp).sum(axis=1).clip(max=1.0)

    @property
    def logratio(self) -> Float[np.ndarray, "n"]:
        """`logP(first) - logP(second)`, in nats."""
        return self.logp[:, 0] - self.logp[:, 1]


@lru_cache(maxsize=256)
def choice_tokens(tok: Tokenizer, choice: str) -> tuple[int, ...]:
    """Every single token that reads as `choice`: any case, with leading spaces or newlines, no glued punctuation."""
    ids = tuple(i for i, text in _vocabulary(tok).items() if text.lstrip(" \n\t").lower() == choice.lower())
    if not ids:
        raise WsError(f"No single token of this tokenizer reads as {choice!r}; choose another answer word.")
    return ids


def choice_variants(tok: Tokenizer, choices: Sequence[Choice], device: torch.device) -> list[Int[Tensor, "_"]]:
    """The tokens of every choice, each once over all its words; `WsError` where two choices share one."""
    return [torch.tensor(ids, device=device) for ids in _ids(tok, choices)]


def _ids(tok: Tokenizer, choices: Sequence[Choice]) -> list[list[int]]:
    ids = [list(dict.fromkeys(i for w in _words(c) for i in choice_tokens(tok, w))) for c in choices]
    for (a, ids_a), (b, ids_b) in combinations(zip(choices, ids, strict=True), 2):
        if not set(ids_a).isdisjoint(ids_b):
            raise WsError(
                f"The answers {a!r} and {b!r} are read as the same tokens, in any case; give two that differ in more."
            )
    return ids


def with_each_token(variants: Sequence[Int[Tensor, "_"]]) -> list[Int[Tensor, "_"]]:
    """The tokens of every choice, and behind them each of those tokens as a choice of its own."""
    return [*variants, *(ids[i : i + 1] for ids in variants for i in range(len(ids)))]


def by_token(tok: Tokenizer, choices: Sequence[Choice], scores: Mapping[str, np.ndarray], most: int = 4) -> str:
    """Which tokens carry the probability of a worked example's choices: ` (by token: '1' 0.801, ' true' 0.012)`.

    Args:
        scores: of an evaluation, with the example's `variants` as `ChoiceScores` has them; empty without.
    """
    if not len(scores.get("variants", ())):  # scores that an earlier version kept
        return ""
    ids, p = [i for of_choice in _ids(tok, choices) for i in of_choice], scores["variants"]
    order = np.argsort(-p, kind="stable")[:most]
    return f" (by token: {', '.join(f'{tok.decode([ids[i]])!r} {p[i]:.3f}' for i in order)})"


def _words(choice: Choice) -> tuple[str, ...]:
    return (choice,) if isinstance(choice, str) else choice


@lru_cache(maxsize=4)
def _vocabulary(tok: Tokenizer) -> dict[int, str]:
    """What each ordinary token decodes to on its own."""
    special = set(tok.all_special_ids)
    ids = [i for i in range(len(tok)) if i not in special]
    return dict(zip(ids, tok.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False), strict=True))


@torch.inference_mode()
def score_choices(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    choices: Sequence[Choice],
    batch_size: int | None = None,
) -> ChoiceScores:
    """Score rendered prompts (openers included) at their next token.

    A choice may be several words that mean the same, such as `("true", "1")`; it is named by the first. Prompts are
    sorted by length and left-padded, a start that several share is run once, and only the last position's logits are
    computed. With `batch_size` None it starts at 64 and falls while memory does not suffice. Scores come back in
    the order of `prompts`.
    """
    if not prompts:
        raise WsError("There are no prompts to score.")
    families = sorted(_families(model, [encode(tok, p) for p in prompts]), key=Family.longest)
    variants = with_each_token(choice_variants(tok, choices, model.device))

    def run(batch_size: int) -> Tensor:
        logp = torch.empty(len(prompts), len(variants), device=model.device)
        with progress(total=len(prompts), desc="answers", unit="prompt") as bar:
            for part in _batches(families, batch_size):
                rows = [row for family in part for row in family.rows]
                logp[rows] = _score_batch(model, tok.pad_token_id, part, variants)
                bar.update(len(rows))
        return logp

    return ChoiceScores.checked(choices, with_batch_size(run, batch_size, START_BATCH))


# ---- one batch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Prompts that begin alike: the common start goes through the model once, in one row with what follows in each.

    Attributes:
        prefix: tokens that all members begin with, empty for a prompt on its own.
        suffixes: what follows in each member, never empty.
        rows: the members' places among all prompts.
    """

    prefix: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    def longest(self) -> int:
        """The length of the longest member."""
        return len(self.prefix) + max(map(len, self.suffixes))

    def pieces(self, size: int) -> list[Family]:
        """The family in parts of at most `size` members; a member on its own has nothing to share."""
        parts = [(self.suffixes[i : i + size], self.rows[i : i + size]) for i in range(0, len(self.rows), size)]
        return [
            Family(self.prefix, suffixes, rows) if len(rows) > 1 else Family((), (self.prefix + suffixes[0],), rows)
            for suffixes, rows in parts
        ]


def _families(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Family]:
    """Families where the model takes a mask of our own in every layer; elsewhere every prompt stands alone."""
    return share_prefixes(prompts) if takes_masks(model) else [_family(prompts, [i], 0) for i in range(len(prompts))]


def share_prefixes(prompts: Sequence[Sequence[int]]) -> list[Family]:
    """Put prompts that share at least their first half into families, such as one text that is asked twice.

    The last token of a prompt is never shared, so one of a single token stands alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    families, members, shared = list[Family](), [order[0]], len(prompts[order[0]])
    for i in order[1:]:
        both = list(zip(prompts[members[0]], prompts[i], strict=False))
        common = min(shared, next((n for n, (a, b) in enumerate(both) if a != b), len(both)))
        shorter, longer = sorted((len(prompts[i]), len(prompts[members[0]])))
        if shorter > 1 and 2 * common >= longer:
            members, shared = [*members, i], common
            continue
        families.append(_family(prompts, members, shared))
        members, shared = [i], len(prompts[i])
    return [*families, _family(prompts, members, shared)]


def _family(prompts: Sequence[Sequence[int]], members: Sequence[int], shared: int) -> Family:
    cut = min(shared, *(len(prompts[i]) - 1 for i in members)) if len(members) > 1 else 0
    suffixes = tuple(tuple(prompts[i][cut:]) for i in members)
    return Family(tuple(prompts[members[0]][:cut]), suffixes, tuple(members))


def _batches(families: Sequence[Family], size: int) -> Iterator[list[Family]]:
    """Families of one size at a time, with at most `size` prompts."""
    pieces = [piece for family in families for piece in family.pieces(size)]
    for members in sorted({len(p.rows) for p in pieces}):
        alike, step = [p for p in pieces if len(p.rows) == members], max(1, size // members)
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def _score_batch(
    model: PreTrainedModel, pad_id: int, families: Sequence[Family], variants: Sequence[Tensor]
) -> Float[Tensor, "rows k"]:
    """Log-probabilities of the choices for every member of every family, in one forward pass."""
    if not families[0].prefix:
        return score_rows(model, pad_id, [f.suffixes[0] for f in families], variants)
    parts = [[f.suffixes[m] for f in families] for m in range(len(families[0].rows))]
    logits, _ = packed_logits(model, pad_id, [f.prefix for f in families], parts)
    return choice_logp(logits.flatten(0, 1), variants)


def score_rows(
    model: PreTrainedModel, pad_id: int, rows: Sequence[Sequence[int]], variants: Sequence[Tensor]
) -> Float[Tensor, "rows k"]:
    """Log-probabilities of the choices behind every row of tokens, which is run from its start."""

    def run(part: Sequence[Sequence[int]]) -> Float[Tensor, "part k"]:
        return choice_logp(row_logits(model, pad_id, part, 1)[:, -1], variants)

    return torch.stack(in_groups(model, rows, run))


def choice_logp(logits: Float[Tensor, "rows vocabulary"], variants: Sequence[Tensor]) -> Float[Tensor, "rows k"]:
    """Log-probabilities of the choices, each summed over its tokens, from a float32 log-softmax."""
    logp = logits.float().log_softmax(dim=-1)
    return torch.stack([logp[:, v].logsumexp(dim=-1) for v in variants], dim=1)
