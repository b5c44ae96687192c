"""Activation steering: a direction that is added to the residual stream, instead of to the weights.

Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681), as Fierro & Roger 2025 (arXiv 2511.05408) set it
beside weight steering. With `h^l_t(q, y)` the residual stream after decoder block `l` at token `t` of the answer `y` to
the question `q`,

    a^l = mean over pairs of  [ mean over t of h^l_t(q, y_pos)  -  mean over t of h^l_t(q, y_neg) ]

and nothing is normalised. The mean is over the tokens of each answer first and over the answers then, so that every
answer counts alike, however long it is. It steers by adding

    alpha a^l                   after one block l, or
    alpha (a^l - a^(l-1))       after every block but the last, with a^(-1) = 0: up to block l these sum to alpha a^l.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors import Behavior, Claim
from ws.behaviors.acting import preference_margins
from ws.console import progress
from ws.data import Pair, answer_ids, prompt_ids
from ws.diff import SavedManifest, read_saved
from ws.errors import DamagedError, WsError, choose, require_strength
from ws.files.places import FolderKind
from ws.files.runs import atomic_folder, library_versions, sha256_file, sha256_json, write_json
from ws.lm.batches import left_pad, padded_groups, row_logits, with_batch_size, written_columns
from ws.lm.choice import score_choices
from ws.lm.models import decoder_blocks, fingerprint, model_id, parse_layers, render_prompt, require_base
from ws.stats import LOW_MASS
from ws.steer import Alpha, Dial, uncompiled

FORMAT_VERSION = 1
MANIFEST, WEIGHTS = "activation.json", "activation.safetensors"
KIND = FolderKind("not an activation vector", (MANIFEST,), (MANIFEST, WEIGHTS))
POSITIONS = ("last", "all")
START_BATCH = 64

Layers = int | str


@dataclass(frozen=True, eq=False)
class ActivationVector:
    """A direction in the residual stream after every decoder block, as a value: `+ - * /` work as on vectors.

    Attributes:
        vectors: `a^l` of the module's equation, float32 `[layers, d_model]`, not normalised.
        base_id: the name of the base model.
        base_fingerprint: of its weights (`ws.lm.models.fingerprint`).
        recipe: how it was made, JSON-serialisable: a source, or an operation on the recipes of its operands.
        info: behaviour and counts, JSON-serialisable.
    """

    vectors: Float[Tensor, "layers d_model"]
    base_id: str
    base_fingerprint: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.dtype != torch.float32:
            raise WsError(f"An activation vector is kept in float32, not in {str(self.vectors.dtype)[6:]}.")
        if not torch.isfinite(self.vectors).all():
            raise WsError("An activation vector holds NaN or infinity; the model it was made with is broken.")

    # ---- the vector space -------------------------------------------------------------------------------------------

    def __add__(self, other: ActivationVector) -> ActivationVector:
        if self.base_fingerprint != other.base_fingerprint:
            raise WsError(
                f"The vectors have different bases: {self.base_id} ({self.base_fingerprint}) and "
                f"{other.base_id} ({other.base_fingerprint})."
            )
        shared = {k: v for k, v in self.info.items() if other.info.get(k) == v}
        recipe = {"op": "+", "terms": [self.recipe, other.recipe]}
        return replace(self, vectors=self.vectors + other.vectors, recipe=recipe, info=shared)

    def __mul__(self, scalar: float | int) -> ActivationVector:
        scalar = require_strength(scalar, "What an activation vector is multiplied by")
        recipe = {"op": "*", "scalar": scalar, "of": self.recipe}
        return replace(self, vectors=self.vectors * scalar, recipe=recipe)

    __rmul__ = __mul__

    def __neg__(self) -> ActivationVector:
        return self * -1.0

    def __sub__(self, other: ActivationVector) -> ActivationVector:
        return self + -other

    def __truediv__(self, scalar: float | int) -> ActivationVector:
        if scalar == 0:
            raise WsError("An activation vector cannot be divided by zero.")
        return self * (1.0 / scalar)

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The number of decoder blocks of the base."""
        return self.vectors.shape[0]

    @property
    def norms(self) -> tuple[float, ...]:
        """The Euclidean norm of `a^l` for every block."""
        return tuple(self.vectors.double().norm(dim=1).tolist())

    @property
    def is_zero(self) -> bool:
        """True when the vector changes nothing."""
        return not self.vectors.any()

    @property
    def digest(self) -> str:
        """SHA-256 of shape and values: two vectors are bit-identical exactly when their digests agree."""
        digest = hashlib.sha256(f"{tuple(self.vectors.shape)}".encode())
        digest.update(self.vectors.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def steps(self, layers: Layers) -> dict[int, Float[Tensor, "d_model"]]:
        """What is added after which block, for alpha 1.

        Args:
            layers: one block's index for `a^l` there, or `all` for the increments after every block but the last.

        Raises:
            WsError: no such block, or nothing to add.
        """
        if layers == "all":
            increments = self.vectors.diff(dim=0, prepend=torch.zeros_like(self.vectors[:1]))
            steps = dict(enumerate(increments[:-1]))
        else:
            if not isinstance(layers, int):
                raise WsError(f"Activations are steered after one block or after `all`, not {layers!r}.")
            (layer,) = parse_layers([layers], self.depth)
            steps = {layer: self.vectors[layer]}
        if not any(step.any() for step in steps.values()):
            raise WsError(f"The activation vector is zero at layers {layers}: it would change nothing.")
        return steps

    def __repr__(self) -> str:
        return f"ActivationVector({self.base_id}, {self.depth} blocks of {self.vectors.shape[1]})"

    # ---- in a model -------------------------------------------------------------------------------------------------

    def matched(self, model: PreTrainedModel) -> list[nn.Module]:
        """The model's decoder blocks in order; `WsError` if the base differs."""
        require_base(model, self.base_id, self.base_fingerprint, "The activation vector was made for")
        return decoder_blocks(model)

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the vector as a folder, all at once and bit for bit; an activation vector there is replaced."""
        folder = Path(folder)
        with atomic_folder(folder, KIND) as part:
            save_file({"vectors": self.vectors.cpu().contiguous()}, part / WEIGHTS)
            manifest = {
                "format": FORMAT_VERSION,
                "base": {"id": self.base_id, "fingerprint": self.base_fingerprint},
                "info": dict(self.info),
                "recipe": dict(self.recipe),
                "norms": list(self.norms),
                "weights": {"file": WEIGHTS, "sha256": sha256_file(part / WEIGHTS)},
                "versions": library_versions(),
            }
            write_json(part / MANIFEST, manifest)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> ActivationVector:
        """Read a saved vector, bit for bit.

        Raises:
            WsError: no vector there, a half-written or altered folder, or a newer format.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise WsError(f"{folder} is not an activation vector: {MANIFEST} is missing.")
        manifest, tensors = read_saved(folder, SavedManifest, MANIFEST)
        base = manifest.base
        if tensors.keys() != {"vectors"} or tensors["vectors"].dim() != 2 or base.fingerprint is None:
            raise DamagedError(f"{folder} is not an activation vector: its weights are others; make it again.")
        return cls(tensors["vectors"], base.id, base.fingerprint, manifest.recipe, manifest.info)


# ---- making one -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """One answer as the model reads it, and with which sign its mean activation counts."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    sign: int

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def activation_vector(
    model: PreTrainedModel,
    tok: Tokenizer,
    pairs: Sequence[Pair],
    behavior: str = "",
    batch_size: int | None = None,
) -> ActivationVector:
    """The mean difference of response activations between the two sides of contrast pairs; see the module's equation.

    The pairs are read as the adapters read them: no system prompt, thinking off, prompt and answer joined alike.
    Only the answer's own tokens count. The end-of-turn token does not: generation ends with it, so it is never steered.
    The mean over an answer's tokens is taken inside the forward pass, and what is kept is one sum per block.

    Args:
        model: the base.
        tok: its tokenizer; the system text of a prompted one is left out.
        pairs: contrast pairs; those with a `drop` reason are skipped.
        behavior: its name, recorded in `info`.
        batch_size: answers per forward pass; None starts at 64 and takes fewer while memory does not suffice.

    Raises:
        WsError: no usable pair, an answer without tokens, or activations that are NaN.
    """
    readings = sorted(_readings(tok, pairs), key=len)
    blocks, base_fingerprint = decoder_blocks(model), fingerprint(model)

    def run(batch_size: int) -> Tensor:
        total = torch.zeros(len(blocks), model.config.get_text_config().hidden_size, dtype=torch.float64)
        with progress(total=len(readings), desc="activations", unit="answer") as bar:
            for start in range(0, len(readings), batch_size):
                part = readings[start : start + batch_size]
                for group in padded_groups(model, part):
                    total += _signed_sum(model, tok.pad_token_id, blocks, [part[i] for i in group])
                bar.update(len(part))
        return total

    total = with_batch_size(run, batch_size, START_BATCH)
    lengths = {name: sum(len(r.answer) for r in readings if r.sign == sign) for name, sign in (("pos", 1), ("neg", -1))}
    n_pairs = len(readings) // 2
    recipe = {"activations": "mean over the answer's tokens, then over answers; positive minus negative"}
    return ActivationVector(
        (total / n_pairs).float(),
        model_id(model),
        base_fingerprint,
        recipe | {"pairs_sha256": sha256_json([p.as_row() for p in pairs])},
        {"behavior": behavior, "n_pairs": n_pairs, "n_answers": len(readings), "n_tokens": lengths},
    )


def _readings(tok: Tokenizer, pairs: Sequence[Pair]) -> list[_Reading]:
    readings = []
    for pair in pairs:
        if pair.drop is not None:
            continue
        prompt = tuple(prompt_ids(tok, pair.question))
        for text, sign in ((pair.pos, 1), (pair.neg, -1)):
            readings.append(_Reading(prompt, tuple(answer_ids(tok, pair.question, text)), sign))
        if not (readings[-1].answer and readings[-2].answer):
            raise WsError(f"The pair {pair.id} has an answer without a single token; give it a reason in `drop`.")
    if not readings:
        raise WsError("There is no usable contrast pair to read activations from.")
    return readings


@torch.inference_mode()
def _signed_sum(
    model: PreTrainedModel, pad_id: int, blocks: Sequence[nn.Module], readings: Sequence[_Reading]
) -> Float[Tensor, "layers d_model"]:
    """The answers' mean activations after every block, summed with their signs, in float64 on the CPU."""
    shares, _ = left_pad([[0] * len(r.prompt) + [1] * len(r.answer) for r in readings], 0, model.device)
    weights = shares / shares.sum(dim=1, keepdim=True)
    signs = torch.tensor([r.sign for r in readings], dtype=torch.float64)
    sums: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            means = (weights[:, None] @ _hidden(output).float()).squeeze(1)
            sums[layer] = signs @ means.cpu().double()

        return hook

    with uncompiled(), ExitStack() as stack:
        for layer, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(keep(layer)).remove)
        last = torch.tensor([-1], device=model.device)  # by its index: with a number some models drop the others midway
        row_logits(model, pad_id, [[*r.prompt, *r.answer] for r in readings], keep=last)
    return torch.stack([sums[layer] for layer in range(len(blocks))])


def _hidden(output: Tensor | tuple[Any, ...]) -> Float[Tensor, "rows length d_model"]:
    """The residual stream in what a block returns, which some architectures pack into a tuple.

    Raises:
        WsError: there are several, as in Gemma 3n.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    if hidden.ndim != 3:
        raise WsError("The blocks of this model hand on several residual streams, so no activation vector fits them.")
    return hidden


# ---- steering with one ----------------------------------------------------------------------------------------------


class _Ends:
    """The columns in which the forward pass under way is read, kept up to date by two hooks of the whole model.

    A pass is read in its last column, unless `logits_to_keep` says otherwise: so many of the last ones, where given
    answers and texts are scored as they would be written, or columns, those where prompts end that share a row. Where
    what was written is read again, it is said row by row (`ws.lm.batches.written_from`).
    """

    LAST = slice(-1, None)

    def __init__(self) -> None:
        self.columns: slice | Tensor = self.LAST

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the columns from the arguments; with padding on the right the last one would be a pad."""
        mask, keep = kwargs.get("attention_mask", args[1] if len(args) > 1 else None), kwargs.get("logits_to_keep")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, -1].all():
            raise WsError("Rows are padded on the right, so their last position is a pad; pad them on the left.")
        self.columns = keep if isinstance(keep, Tensor) else slice(-keep, None) if keep else self.LAST
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(tokens, Tensor) and (written := written_columns(tokens.shape)) is not None:
            self.columns = written

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget them, also when the pass failed."""
        self.columns = self.LAST

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[None]:
        """The hooks on the model while the block runs."""
        before = model.register_forward_pre_hook(self.before, with_kwargs=True)
        after = model.register_forward_hook(self.after, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


class _Adder:
    """The forward hook of one block; without `ends` it adds in all columns."""

    def __init__(self, step: Float[Tensor, "d_model"], dial: Dial, ends: _Ends | None) -> None:
        self.step, self.dial, self.ends = step, dial, ends

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.dial.is_off:
            return output
        hidden = _hidden(output)
        if self.step.device != hidden.device:
            self.step = self.step.to(hidden.device)
        shift = (self.dial.over(hidden) * self.step).to(hidden.dtype)
        if self.ends is None or hidden.shape[1] == 1:
            moved = hidden + shift
        elif isinstance(self.ends.columns, Tensor) and self.ends.columns.ndim == 2:
            moved = hidden + shift * self.ends.columns[..., None].to(hidden.device)
        else:
            moved = hidden.clone()
            moved[:, self.ends.columns] += shift
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


@contextmanager
def activation_steer(
    model: PreTrainedModel,
    vector: ActivationVector,
    alpha: Alpha = 1.0,
    layers: Layers = "all",
    position: str = "last",
) -> Iterator[Dial]:
    """Add `alpha * vector` to the residual stream inside a `with` block; the model leaves it exactly as it came.

    Contexts nest, also with `ws.steer`, and add up.

    Args:
        model: the base the vector was made for.
        vector: what to add.
        alpha: the steering strength, a finite float or a tensor `[batch]`.
        layers: after which block; see `ActivationVector.steps`.
        position: `last` adds at the last position of every forward pass, that is where a choice is scored and at every
            generated token (the paper's `response`); in rows that hold several prompts, where each of them ends, and
            where given answers or texts are scored, or thoughts read again, at every token that one of theirs follows.
            `all` adds at every position; what is added at pads is never seen, for nothing attends to them.

    Yields:
        The `Dial`.

    Raises:
        WsError: another base, no such layer or position, a zero vector, an alpha that is not finite, or, in a forward
            pass under `last`, rows that are padded on the right.
    """
    choose("position", position, POSITIONS)
    dial, blocks, steps = Dial(alpha), vector.matched(model), vector.steps(layers)
    ends = _Ends() if position == "last" else None
    with uncompiled(), ExitStack() as stack:
        if ends is not None:
            stack.enter_context(ends.followed(model))
        for layer, step in steps.items():
            stack.callback(blocks[layer].register_forward_hook(_Adder(step, dial, ends)).remove)
        stack.callback(dial.end)
        yield dial


# ---- which layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerScore:
    """What steering after one block does to the held-out items of `dev`.

    Attributes:
        layer: the block.
        alpha, minus: the positive and the negative strength tried.
        norm: of what was added at the positive one, `alpha ‖a^l‖`.
        span: mean change from the negative strength to the positive one, in nats: of the preference per token where the
            behaviour brings questions with both answers, else of `logP(agree) - logP(disagree)` on false claims.
        span_true: the same on true claims; None when there are none.
        effect: `span` with the sign that the behaviour should give it, so that more is better.
        pmass: the lowest mean answer mass of either sign; None for preference.
    """

    layer: int
    alpha: float
    minus: float
    norm: float
    span: float
    span_true: float | None
    effect: float
    pmass: float | None


@dataclass(frozen=True)
class LayerChoice:
    """The layer with the largest effect among those that leave the answers whole, and the scores of all."""

    best: LayerScore
    scores: tuple[LayerScore, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer, for a table; None becomes an empty cell."""
        return [asdict(s) | {"chosen": s is self.best} for s in self.scores]


def choose_layer(
    model: PreTrainedModel,
    tok: Tokenizer,
    vector: ActivationVector,
    behavior: Behavior,
    alpha: float | int = 1.0,
    norm: float | int | None = None,
    position: str = "last",
    layers: str | Sequence[int] = "all",
    batch_size: int | None = None,
    strengths: Mapping[int, tuple[float, float]] | None = None,
) -> LayerChoice:
    """Choose the one layer to steer after, on the behaviour's held-out items of `dev` and on nothing else.

    Args:
        model, tok: the base.
        vector: what to steer with.
        behavior: whose questions with both answers are read, or else whose claims as in `ws.evaluate_sycophancy`.
        alpha: the strength to compare layers at.
        norm: compare them at equal norms of what is added, `alpha = norm / ‖a^l‖`, instead.
        position: see `activation_steer`.
        layers: the candidates, as for `ws.lm.models.parse_layers`.
        batch_size: see `ws.lm.choice.score_choices` and `ws.lm.likelihood.score_answers`.
        strengths: negative and positive strength per layer instead, such as those that cost the same divergence; only
            layers that have them are tried.

    Raises:
        WsError: a strength that is not positive, a zero vector, or no layer at which the answers keep a mass of 0.9.
    """
    size = alpha if norm is None else norm
    if not (math.isfinite(size) and size > 0):
        raise WsError(f"Layers are compared at a positive strength or norm, not at {size}.")
    norms = vector.norms
    tried = [i for i in parse_layers(layers, vector.depth) if norms[i] > 0]
    if not tried:
        raise WsError(f"The activation vector is zero at layers {layers}: it would change nothing.")
    sizes = {i: float(alpha) if norm is None else norm / norms[i] for i in tried}
    pairs = (
        {i: (-a, a) for i, a in sizes.items()}
        if strengths is None
        else {i: strengths[i] for i in tried if i in strengths}
    )
    scores = tuple(
        _score_layer(model, tok, vector, behavior, i, pair, position, batch_size) for i, pair in pairs.items()
    )
    whole = [s for s in scores if s.pmass is None or s.pmass >= LOW_MASS]
    if not whole:
        raise WsError(
            f"Steering breaks the answers at each of the {len(scores)} layers tried (mass under {LOW_MASS}); use less."
        )
    return LayerChoice(max(whole, key=lambda s: s.effect), scores)


def _score_layer(
    model: PreTrainedModel,
    tok: Tokenizer,
    vector: ActivationVector,
    behavior: Behavior,
    layer: int,
    strengths: tuple[float, float],
    position: str,
    batch_size: int | None,
) -> LayerScore:
    low, high = strengths
    facts: dict[str, Any] = {"layer": layer, "alpha": high, "minus": low, "norm": high * vector.norms[layer]}
    if behavior.held_out("dev"):
        with activation_steer(model, vector, low, layer, position) as dial:
            below = preference_margins(model, tok, behavior, batch_size=batch_size)
            dial.alpha = high
            span = float((preference_margins(model, tok, behavior, batch_size=batch_size) - below).mean())
        return LayerScore(**facts, span=span, span_true=None, effect=span, pmass=None)
    test = behavior.test
    claims: list[Claim] = sorted((c for c in test.claims if c.split == "dev"), key=lambda c: c.is_true)
    n_false = len(test.select("dev", is_true=False))
    prompts = [render_prompt(tok, test.question.format(claim=c.text), opener=test.opener) for c in claims]
    with activation_steer(model, vector, low, layer, position) as dial:
        minus = score_choices(model, tok, prompts, (test.agree, test.disagree), batch_size)
        dial.alpha = high
        plus = score_choices(model, tok, prompts, (test.agree, test.disagree), batch_size)
    change = plus.logratio - minus.logratio
    span = float(change[:n_false].mean())
    return LayerScore(
        **facts,
        span=span,
        span_true=float(change[n_false:].mean()) if len(claims) > n_false else None,
        effect=test.effect * span,
        pmass=float(min(minus.mass.mean(), plus.mass.mean())),
    )
