"""What every evaluation command shares: the model, the vector of a run, the strengths, and the base's cached scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.console import say
from ws.diff import SteeringVector
from ws.errors import WsError
from ws.models import fingerprint, load_model
from ws.runs import DEFAULT_OUT, Run, run_folder, slug, write_json
from ws.steer import steer

Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EvalOptions:
    """The options every evaluation takes.

    Attributes:
        model: None for the base that the vector was made for.
        behavior, adapter, seed: which run below `out`.
        out: where runs and results are.
        alphas: steering strengths; 0, the base, is always included.
        batch_size: prompts per forward pass, found automatically when None.
        limit: only the first so many items.
        dataset: a hub id, a local folder, or `pocket`; None for the published set (`pocket` on the bundled models).
        prompts: a TOML file that replaces the instruction texts.
        n_bootstrap: resamples per interval.
        device, dtype: see `ws.load_model`.
    """

    model: str | None = None
    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT
    alphas: tuple[float, ...] = (-1.0, 0.0, 1.0)
    batch_size: int | None = None
    limit: int | None = None
    dataset: str | None = None
    prompts: Path | None = None
    n_bootstrap: int = 1000
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class EvalContext:
    """A loaded model with the vector to steer it and the folder its results go to."""

    options: EvalOptions
    model: PreTrainedModel
    tok: Tokenizer
    vector: SteeringVector
    run: Run

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of every table."""
        return {"behavior": self.options.behavior, "adapter": self.options.adapter, "seed": self.options.seed}

    @property
    def alphas(self) -> list[float]:
        """The strengths in order, base included."""
        return sorted({0.0, *map(float, self.options.alphas)})

    def over_alphas(self, name: str, item_hash: str, evaluate: Callable[[], Scores]) -> dict[float, Scores]:
        """Evaluate at every strength; the base's scores depend on no vector and are computed once per model."""
        results = {}
        for alpha in self.alphas:
            say(f"{name} at alpha {alpha:+g}")
            if alpha == 0:
                results[alpha] = self._base_scores(name, item_hash, evaluate)
                continue
            with steer(self.model, self.vector, alpha):
                results[alpha] = evaluate()
        return results

    def _base_scores(self, name: str, item_hash: str, evaluate: Callable[[], Scores]) -> Scores:
        model = str(self.model.name_or_path)
        mark = f"{fingerprint(self.model)}-{str(self.model.dtype)[6:]}"
        file = self.options.out / "base" / slug(model) / f"{name}-{item_hash}-{mark}.json"
        if file.is_file():
            return {k: np.array(v) for k, v in json.loads(file.read_text()).items()}
        scores = evaluate()
        write_json(file, {k: np.asarray(v).tolist() for k, v in scores.items()})
        return scores


def open_context(options: EvalOptions) -> EvalContext:
    """Load what an evaluation needs; `WsError` when the run has no vector, or the vector is of another base."""
    folder = run_folder(options.out, options.behavior, options.adapter, options.seed)
    if not (folder / "vector").is_dir():
        raise WsError(
            f"There is no vector in {folder}; make it with `python -m ws.replicate --behavior {options.behavior} "
            f"--adapter {options.adapter}`."
        )
    vector = SteeringVector.load(folder / "vector")
    model, tok = load_model(options.model or vector.base_id, options.device, options.dtype)
    vector.matched(model)
    return EvalContext(options, model, tok, vector, Run(folder))
