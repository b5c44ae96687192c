"""Before a run's first stage: whether the base answers what the run will be read by at its end."""

from __future__ import annotations

from collections.abc import Sequence

from ws import console
from ws.errors import WsError
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation
from ws.eval.readable import OF_BASE


def require_readable(context: EvalContext, asked: Sequence[Evaluation], anyway: bool) -> None:
    """Put a run's evaluations to the base, which would be asked at the end anyway, and warn of what cannot be read.

    Args:
        context: the base alone (`EvalContext.of_base`); its scores are kept for the run.
        asked: with the items that the run is read by.
        anyway: go on where nothing can be read.

    Raises:
        WsError: nothing can be read, and so nothing would be known of any vector.
    """
    problems, n_scores = list[str](), 0
    for evaluation in asked:
        scores = context.base_scores(evaluation)
        titles = {s.key: s.title for s in evaluation.scores if s.key in evaluation.headlines(scores)}
        doubts = {titles[key]: r.problem for key, r in evaluation.readability(scores).items() if key in titles}
        problems += [f"{title} ({problem})" for title, problem in doubts.items() if problem]
        n_scores += len(titles)
    if not problems:
        return
    text = f"on this base there is no reading {', '.join(problems)}: {OF_BASE}"
    if len(problems) == n_scores and not anyway:
        raise WsError(f"Nothing that this run would be read by can be read: {text}. --anyway goes on.")
    console.warn(f"{text}.")
