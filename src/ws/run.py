"""A finished run: the vector that a run has made, with the model it steers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors import Behavior, load_behavior
from ws.console import command_line
from ws.data import PAIRS_FILE, Pair, question_key, question_keys, read_pairs
from ws.diff import SteeringVector
from ws.errors import WsError
from ws.files.runs import Run, data_folder, sha256_json
from ws.lm.models import load_model
from ws.options.shared import RunOptions, folder_with_vector


@dataclass(frozen=True)
class FinishedRun:
    """A run that has a vector, loaded.

    Attributes:
        run: its folder, with `vector/` in it.
        vector: what steers.
        model, tok: the model that the vector fits.
        out: where runs are, its own among them.
    """

    run: Run
    vector: SteeringVector
    model: PreTrainedModel
    tok: Tokenizer
    out: Path

    def unseen(self, behavior: Behavior) -> tuple[str, ...] | None:
        """The behaviour's questions that no kept pair uses; None where it is not on record what was trained on.

        Pairs are those of the behaviour and the base (activation vectors are read off them, too), those in the run's
        folder, and those that the vector's recipe says its arms were trained on.
        """
        known = {digest: question_keys(pairs) for digest, pairs in self._pairs(behavior).items()}
        seen = set().union(*known.values())
        for source in sources(self.vector.recipe):
            if "questions" in source:
                seen |= set(str(source["questions"]).split())
            elif source.get("pairs_sha256") not in known:
                return None
        return tuple(q for q in behavior.questions if question_key(q) not in seen)

    def training(self, behavior: Behavior) -> tuple[Mapping[str, Any], list[Pair]]:
        """The recipe of the training that made the vector (settings, seed, contrast), and the pairs it learned from.

        Raises:
            WsError: another origin than one training on pairs, or pairs that are gone or have changed since.
        """
        recipes = list(sources(self.vector.recipe))
        made_by = {sha256_json([r.get(key) for key in ("config", "seed", "contrast", "pairs_sha256")]) for r in recipes}
        if len(made_by) != 1 or not isinstance(recipes[0].get("config"), Mapping):
            raise WsError(
                f"The vector in {self.run.folder} does not come from one training on contrast pairs, so there is no "
                "gradient of it; leave `gradient` and `gradient-low-rank` out of --interventions."
            )
        pairs = self._pairs(behavior).get(str(recipes[0].get("pairs_sha256")))
        if pairs is None:
            raise WsError(
                f"The pairs that the vector in {self.run.folder} was trained on are neither there nor in "
                f"{data_folder(self.out, self.vector.base_id, behavior.name)}, or have changed; put them back, or "
                "leave `gradient` and `gradient-low-rank` out of --interventions."
            )
        return recipes[0], pairs

    def _pairs(self, behavior: Behavior) -> dict[str, list[Pair]]:
        """By their hash, the pairs of the behaviour and the base, and those in the run's folder."""
        shared = data_folder(self.out, self.vector.base_id, behavior.name)
        files = [f for folder in (shared, self.run.folder) if (f := folder / PAIRS_FILE).is_file()]
        return {sha256_json([p.as_row() for p in pairs]): pairs for pairs in map(read_pairs, files)}


def sources(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a vector was computed from: the recipes inside a recipe that are of no operation on others."""
    parts = [recipe["of"]] if "of" in recipe else recipe["terms"] if recipe.get("op") == "+" else None
    if parts is None:
        yield recipe
    for part in parts or ():
        yield from sources(part)


def measure_with(options: RunOptions) -> str:
    """The command that puts a run's vector to what its behaviour holds out: claims, or else questions with answers."""
    try:
        name = "sycophancy" if load_behavior(options.behavior, options.model).claims else "preference"
    except WsError:  # the vector is of a behaviour whose file is not at hand
        name = "sycophancy"
    return command_line(f"ws eval {name}", options, always=("behavior", "adapter"))


def vector_of_run(out: Path, behavior: str, adapter: str, seed: int, otherwise: str = "") -> tuple[Run, SteeringVector]:
    """A run and its vector; `WsError` with the command that makes it, and with another way out, when there is none."""
    folder = folder_with_vector(out, behavior, adapter, seed, otherwise)
    return Run(folder), SteeringVector.load(folder / "vector")


def open_run(
    out: Path,
    behavior: str,
    adapter: str,
    seed: int,
    model: str | None,
    device: str = "auto",
    dtype: str = "auto",
    loaded: tuple[PreTrainedModel, Tokenizer] | None = None,
) -> FinishedRun:
    """Load the vector of a run and its model, by default the base that the vector was made for.

    Args:
        out: where runs are.
        behavior, adapter, seed: which one.
        model: None for the base.
        device, dtype: see `ws.load_model`.
        loaded: a model and its tokenizer that are at hand already, to be used instead.

    Raises:
        WsError: the run has no vector, or the vector is of another base.
    """
    run, vector = vector_of_run(out, behavior, adapter, seed)
    base, tok = loaded or load_model(model or vector.base_id, device, dtype)
    vector.matched(base)
    return FinishedRun(run, vector, base, tok, out)


def open_options(options: RunOptions) -> FinishedRun:
    """The run that options name, loaded; see `open_run`."""
    o = options
    return open_run(o.out, o.behavior, o.adapter, o.seed, o.model, o.device, o.precision)
