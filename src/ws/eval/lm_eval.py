"""Any task of the lm-evaluation-harness on the steered model, in this process.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra `bench`) brings the tasks, their prompts and
their metrics; it is handed the model that is loaded here, so that a vector steers it as in every other evaluation.
Tasks of your own are YAML files in `--include-path`. A task may name Python functions beside its YAML (`!function`):
that code, of the installed harness and of your folder, runs; code from a hub repository never does.

A task is read at every strength with the same documents and the same examples in its prompt, so shifts against the base
are paired document by document wherever the harness averages a metric over documents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import constants
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors.tables import draw, draw_fact
from ws.errors import WsError, did_you_mean
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import ByAlpha, Evaluation, Rows, Scores
from ws.eval.prompts import notes_on
from ws.files.runs import sha256_file, sha256_json
from ws.lm.batches import in_batches, left_pad, takes_padding
from ws.lm.hub import hub_is_out_of_reach
from ws.lm.likelihood import Ids, most_at_once, read_answers, token_logp
from ws.lm.models import chat_format, default_system, encode, encode_after, encode_answer, end_ids, render_prompt
from ws.options.measure import NO_PERSONA
from ws.options.measure import LmEvalOptions as LmEvalOptions
from ws.stats import Estimate, estimate_mean

NAME, VERSION = "lm_eval", 4
BATCH_SIZE, FEWSHOT_SEED, STDERR_DRAWS = 8, 1234, 1000
# Metrics that are no mean over documents (a perplexity, an F1 score) come with values that do not average to them.
_SAME = 1e-9

Results = Mapping[str, Any]


# ---- the harness ----------------------------------------------------------------------------------------------------


def require_harness() -> str:
    """The version of the harness; `WsError` when it is not installed."""
    if find_spec("lm_eval") is None:
        raise WsError(
            "The lm-evaluation-harness is not installed; `uv sync --extra bench` adds it for good, "
            "`uv run --extra bench ws eval lm-eval ...` for one command."
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return version("lm-eval")


def load_tasks(names: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None) -> Any:
    """The tasks, groups or tags of these names with their data, as `lm_eval.evaluate` takes them.

    Args:
        names: of the harness or of the YAML files below `include_path`.
        num_fewshot: examples in the prompt; None for each task's own number. Tasks defined without any stay so.

    Raises:
        WsError: an unknown name, data that cannot be had, or a task that runs what a model wrote or shows images.
    """
    import datasets

    if hub_is_out_of_reach():  # then the local cache serves, or nothing; retrying for minutes would not help
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    manager = _manager(names, include_path)
    try:
        loaded = manager.load(list(names))
    except Exception as problem:  # the harness and its data sets raise many kinds for one cause
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise WsError(
            f"The tasks {', '.join(names)} could not be loaded ({type(problem).__name__}: {first}); a data set of the "
            "hub needs the network once, a local one the path that its YAML file names."
        ) from problem
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise WsError(f"The task {name} runs code that a model wrote, or shows images; neither is done here.")
        default_shots = task.get_config("num_fewshot")
        if default_shots is None or (default_shots and num_fewshot is not None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return loaded


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks; its own thousands are read only when they are needed."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            listed = hint if "Did you mean" in hint else " `lm-eval ls tasks` lists those of the harness."
            raise WsError(f"There is no harness task named {name!r}{_beside(include_path)}.{listed}")
    return manager


def _beside(include_path: Path | None) -> str:
    return f", nor one in {include_path}" if include_path else ""


def run_harness(
    model: PreTrainedModel,
    tok: Tokenizer,
    tasks: Any,
    limit: int | None = None,
    batch_size: int | None = None,
    chat: bool = False,
) -> Results:
    """The harness's results for the model as it stands, samples included.

    Args:
        tasks: see `load_tasks`; may be used again, and puts the same examples into the same prompts then.
        limit: only so many documents of each task, drawn as every evaluation's items; the harness's own `--limit` takes
            the first.
        batch_size: requests at a time, 8 when None; one at a time where the model does not take padding.
        chat: put the prompts into the chat template with `ws.lm.models.render_prompt`; otherwise they are plain texts,
            which the harness tokenises as it always does.

    Raises:
        WsError: log-likelihoods that are NaN, or a tokenizer with a persona (`ws.intervene.prompt`) where a task has no
            place for it: without `chat`, and where the task rates plain texts.
    """
    from lm_eval import evaluate
    from lm_eval.utils import hash_string

    if default_system(tok):
        _require_place(tasks, chat)
    size = (batch_size or BATCH_SIZE) if takes_padding(model) else 1
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    lm = (chat_model if chat else plain_model)(model, tok, size)
    results = evaluate(
        lm=lm,
        task_dict=tasks,
        samples=_drawn(tasks, limit) if limit else None,
        bootstrap_iters=STDERR_DRAWS,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    asked = [sample for samples in results["samples"].values() for sample in samples]
    for sample in asked if chat else ():  # a persona leaves what a task asks as it is
        prompt = sample["arguments"][0][0]
        sample["prompt_hash"] = hash_string(lm.plain.get(prompt, prompt))
    answers = [sample["resps"] for sample in asked]
    if any(math.isnan(number) for number in _numbers(answers)):
        raise WsError("The model gave NaN log-likelihoods; its weights or the steering strength are broken.")
    return results


def _drawn(tasks: Any, limit: int | None) -> dict[str, list[int]]:
    """The places of the documents that are asked, by task."""
    return {name: list(draw(range(len(task.eval_docs)), limit)) for name, task in tasks["tasks"].items()}


def _require_place(tasks: Any, chat: bool) -> None:
    """`WsError` where a task has no place for a persona."""
    if not chat:
        raise WsError(NO_PERSONA)
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":  # which the harness puts into no template
            raise WsError(
                f"The task {name} rates plain texts, with --chat as without, and those have no place for a persona; "
                "leave it or --interventions prompt out."
            )


def _document_hashes(tasks: Any, limit: int | None) -> dict[str, list[str]]:
    """Of every task the hash of the documents that are asked, and of those that examples in the prompt come from."""
    hashes = dict[str, list[str]]()
    for name, places in _drawn(tasks, limit).items():
        task = tasks["tasks"][name]
        documents = task.eval_docs
        asked, shown = [documents[i] for i in places], task.fewshot_docs() if task.get_config("num_fewshot") else ()
        hashes[name] = [sha256_json([str(document) for document in part]) for part in (asked, shown)]
    return hashes


class _Continuations:
    """Continuations of the harness's model, read as answers are everywhere else.

    By itself the harness pads on the right and says nothing of where a continuation begins, so that what acts where an
    answer is read would act on the pads; and it takes the softmax in the dtype of the logits.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    batch_size: int
    max_length: int

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of every continuation the log-probability in nats, and whether each of its tokens is the likeliest."""
        # What is longer than the model allows is cut at its start.
        asked = [(tuple(context[-max(1, self.max_length + 1 - len(of)) :]), of) for _, context, of in requests]
        most = most_at_once(self.model, [[of] for _, of in asked])

        def run(part: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
            by_prompt = dict[Ids, list[int]]()
            for i, (prompt, _) in enumerate(part):
                by_prompt.setdefault(prompt, []).append(i)
            answers = [[part[i][1] for i in places] for places in by_prompt.values()]
            found = read_answers(self.model, self.tokenizer.pad_token_id, list(by_prompt), answers, _said)
            said = dict(zip(chain(*by_prompt.values()), chain(*found), strict=True))
            return [said[i] for i in range(len(part))]

        size = min(self.batch_size, most)
        return in_batches(asked, run, size, size, lambda a: (len(a[0]), a[0], len(a[1])), "continuations", "request")


def _said(logits: Tensor, answer: Ids) -> tuple[float, bool]:
    return float(token_logp(logits, answer).double().sum()), logits.argmax(dim=-1).tolist() == list(answer)


def plain_model(pretrained: PreTrainedModel, tokenizer: Tokenizer, batch_size: int) -> Any:
    """The harness's model for plain texts, which reads continuations as answers are read everywhere else."""
    from lm_eval.models.huggingface import HFLM

    class PlainModel(_Continuations, HFLM):
        pass

    return PlainModel(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)


def chat_model(pretrained: PreTrainedModel, tokenizer: Tokenizer, batch_size: int) -> Any:
    """The harness's model, but chats are rendered, joined with their answers and ended as they are everywhere else.

    The harness would leave thinking on, drop the system text of templates that have no such role, add a start of text
    to what a template without one has written, and count the last line break of the prompt as a part of the answer.
    """
    from lm_eval.models.huggingface import HFLM

    open_prompts = set[str]()  # those that end where an answer starts, and not with the start of one

    class ChatModel(_Continuations, HFLM):
        plain: ClassVar[dict[str, str]] = {}  # what prompts with a persona are without it

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The prompt up to the answer; without `add_generation_prompt` the last message is the answer's start.

            A persona stands in front of the task's own system text.
            """
            messages, persona = list(chat_history), default_system(self.tokenizer)
            opener = "" if add_generation_prompt else messages.pop()["content"]
            system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
            *earlier, last = messages
            render = partial(render_prompt, self.tokenizer, last["content"], opener=opener, earlier=earlier)
            prompt = render(system="\n\n".join(filter(None, (persona, system))))
            if persona:
                self.plain[prompt] = render(system=system)
            if not opener:
                open_prompts.add(prompt)
            return prompt

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            join = encode_answer if context in open_prompts else encode_after
            return encode(self.tokenizer, context), join(self.tokenizer, context, continuation)

        def tok_batch_encode(
            self,
            strings: Sequence[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            **options: Any,
        ) -> tuple[Tensor, Tensor]:
            """Prompts to generate from, the last `left_truncate_len` tokens of each."""
            rows = [encode(self.tokenizer, text)[-(left_truncate_len or 0) :] for text in strings]
            return left_pad(rows, self.tokenizer.pad_token_id, self.device)

        @property
        def eot_token_id(self) -> int | None:
            """The token that ends an answer."""
            return chat_format(self.tokenizer).end_of_turn_id

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            options.setdefault("eos_token_id", end_ids(self.model, self.tokenizer))
            return super()._model_generate(context, max_length, stop, **options)

    return ChatModel(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)


def _numbers(value: Any) -> Iterator[float]:
    """Every float in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, float):
        yield value


# ---- scores ---------------------------------------------------------------------------------------------------------


def scores_of(results: Results) -> Scores:
    """The harness's results as plain columns.

    Returns:
        Per task, metric and filter: `task`, `metric`, `filter`, `version`, `hash` (of the documents, prompts and
        targets, 12 hex digits; empty for a group), `value`, `stderr`, `n`, `n_shot`, `higher_is_better`, the last four
        None where unknown. Per document with a number for a metric: `sample_row` (which of those rows), `sample_doc`,
        `sample_value`. `example` is the first prompt.
    """
    rows: list[dict[str, Any]] = []
    samples: list[tuple[int, int, float]] = []
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            samples += [(len(rows), doc, x) for doc, x in _samples(results, task, metric, filtered)]
            rows.append(_score_row(results, task, metric, filtered, metrics))
    if not rows:
        raise WsError("The harness gave no metric that is a number.")
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    for i, (name, kind) in enumerate((("sample_row", int), ("sample_doc", int), ("sample_value", float))):
        columns[name] = np.array([sample[i] for sample in samples], dtype=kind)
    first = next(sample for task_samples in results["samples"].values() for sample in task_samples)
    return columns | {"example": np.array([str(first["arguments"][0][0])])}


def _score_row(results: Results, task: str, metric: str, filtered: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    value, stderr = float(metrics[f"{metric},{filtered}"]), metrics.get(f"{metric}_stderr,{filtered}", "N/A")
    if not math.isfinite(value):
        raise WsError(f"The metric {metric} of the task {task} is {value}; the model or the task is broken.")
    return {
        "task": task,
        "metric": metric,
        "filter": filtered,
        "version": str(results["versions"].get(task, "")),
        "hash": _task_hash(results, task),
        "value": value,
        "stderr": float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
        "n": results["n-samples"].get(task, {}).get("effective"),
        "n_shot": results["n-shot"].get(task),
        "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))


def _samples(results: Results, task: str, metric: str, filtered: str) -> list[tuple[int, float]]:
    """`(document, value)` of every document that has a number for the metric."""
    filtered_samples = [s for s in results["samples"].get(task, []) if s["filter"] == filtered]
    return [(int(s["doc_id"]), float(s[metric])) for s in filtered_samples if _is_number(s.get(metric))]


def _task_hash(results: Results, task: str) -> str:
    parts = [[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in results["samples"].get(task, [])]
    return sha256_json(parts)[:12] if parts else ""


# ---- tables ---------------------------------------------------------------------------------------------------------


def per_sample_rows(key: Mapping[str, Any], alpha: float, scores: Scores) -> Rows:
    """Rows of `lm_eval_per_sample.csv`; `key` holds behavior, adapter and seed."""
    samples = zip(scores["sample_row"], scores["sample_doc"], scores["sample_value"], strict=True)
    names = ("task", "metric", "filter")
    return [
        {**key, "alpha": alpha, **{n: scores[n][row] for n in names}, "doc_id": int(doc), "value": float(value)}
        for row, doc, value in samples
    ]


def summary_rows(key: Mapping[str, Any], alpha: float, scores: Scores, base: Scores, n_boot: int) -> Rows:
    """Rows of `lm_eval_summary.csv`, one per task, metric and filter, with the shift against the base.

    The interval is from a bootstrap over documents; it is empty where the metric is no mean over them.
    """
    for name in ("task", "metric", "filter", "hash"):
        if list(scores[name]) != list(base[name]):
            raise WsError(f"The harness asked another {name} under steering than of the base; run it again.")
    rows = []
    for i, (value, before) in enumerate(zip(scores["value"], base["value"], strict=True)):
        shift = _paired_shift(scores, base, i, n_boot)
        row = {name: scores[name][i] for name in ("task", "version", "hash", "metric", "filter", "value", "stderr")}
        row |= {name: scores[name][i] for name in ("n", "n_shot", "higher_is_better")}
        names = ("shift_ci_lo", "shift_ci_hi", "shift_p")
        known = shift.columns("shift", "ci_lo", "ci_hi", "p") if shift else dict.fromkeys(("shift", *names))
        rows.append({**key, "alpha": alpha, **row, **known, "shift": float(value - before)})
    return rows


def _paired_shift(scores: Scores, base: Scores, row: int, n_boot: int) -> Estimate | None:
    """The mean paired difference over documents; None where it is not what the metric's difference is."""
    mine, theirs = (s["sample_value"][s["sample_row"] == row] for s in (scores, base))
    if not len(mine) or len(mine) != len(theirs):
        return None
    if any(abs(v.mean() - s["value"][row]) > _SAME for v, s in ((mine, scores), (theirs, base))):
        return None
    return estimate_mean(mine - theirs, n_boot)


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(summary: Sequence[Mapping[str, str]]) -> str:
    """The rows of the summary table, read from its file, as a table for people."""
    rows = [
        [
            f"{r['task']} ({r['n_shot']} shots)" if r["n_shot"] else r["task"],
            r["metric"] if r["filter"] == "none" else f"{r['metric']} ({r['filter']})",
            f"{float(r['alpha']):+g}",
            f"{float(r['value']):.4f}" + (f" ± {float(r['stderr']):.4f}" if r["stderr"] else ""),
            f"{float(r['shift']):+.4f}" + _interval(r),
            r["n"],
        ]
        for r in sorted(summary, key=lambda r: (r["task"], r["metric"], r["filter"], float(r["alpha"])))
    ]
    header = ["task", "metric", "alpha", "value ± standard error", "shift", "documents"]
    notes = notes_on(summary[-1])
    return "\n".join([tabulate(rows, header, disable_numparse=True), *([""] if notes else []), *notes])


def _interval(row: Mapping[str, str]) -> str:
    return f" [{float(row['shift_ci_lo']):+.4f}, {float(row['shift_ci_hi']):+.4f}]" if row["shift_ci_lo"] else ""


# ---- the evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Harness(Evaluation):
    """Tasks of the lm-evaluation-harness.

    Attributes:
        items: the tasks, loaded, with the documents that are asked (`load_tasks`).
        options_given: those that name them.
        harness: its version.
    """

    name = NAME
    version = VERSION
    options = LmEvalOptions
    sparse = ("stderr", "n", "n_shot", "higher_is_better")

    items: Any
    options_given: LmEvalOptions
    harness: str

    @classmethod
    def of_run(cls, context: EvalContext) -> Harness:
        """The harness tasks that a run's options name."""
        options = context.options
        if not isinstance(options, LmEvalOptions):
            raise WsError("A harness evaluation needs LmEvalOptions, which name the tasks.")
        harness = require_harness()
        tasks = load_tasks(options.tasks, options.include_path, options.num_fewshot)
        if "prompt" in options.interventions:
            _require_place(tasks, options.chat)
        parts = (_drawn(tasks, limit) for limit in (options.limit, None))
        drawn = draw_fact(*([i for places in part.values() for i in places] for part in parts))
        facts = {"harness": harness, "chat_template": options.chat, "drawn": drawn}
        return cls(items=tasks, options_given=options, harness=harness, batch_size=options.batch_size, facts=facts)

    @property
    def content(self) -> Any:
        """The harness, the tasks and their settings, and the hashes of their documents and of one's own files."""
        o = self.options_given
        shown: list[Any] = [self.harness, *o.tasks, o.num_fewshot, o.limit, "chat" if o.chat else False]
        places = [_drawn(self.items, o.limit)] if o.limit else []
        return [[*shown, *places], _document_hashes(self.items, o.limit), folder_hashes(o.include_path)]

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """See `scores_of`."""
        o = self.options_given
        return scores_of(run_harness(model, tok, self.items, o.limit, self.batch_size, o.chat))

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """The summary, and the samples where there are any."""
        base, by_alpha = scores[0.0], scores.items()
        summary = [row for a, s in by_alpha for row in summary_rows(key, a, s, base, n_bootstrap)]
        samples = [row for a, s in by_alpha for row in per_sample_rows(key, a, s)]
        return {"summary": summary} | ({"per_sample": samples} if samples else {})

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The rows of the summary table as a table for people."""
        return render(summary)

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One worked example, to read by eye: the first prompt, and the first metric at every strength."""
        base = scores[0.0]
        lines = [f"Worked example ({base['task'][0]}):", str(base["example"][0]), ""]
        lines += [f"  alpha {alpha:+g}  {s['metric'][0]} {s['value'][0]:.4f}" for alpha, s in sorted(scores.items())]
        return "\n".join(lines)


def folder_hashes(folder: Path | None) -> dict[str, str]:
    """The hash of every file below a folder of tasks, by its path in there."""
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder else []
    return {str(f.relative_to(folder)): sha256_file(f) for f in files if "__pycache__" not in f.parts} if folder else {}


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: LmEvalOptions) -> None:
    """The command `python -m ws.eval.lm_eval`."""
    require_harness()
    context = open_context(options)
    console.show(context.carry_out(Harness.of_run(context)))


if __name__ == "__main__":
    console.run(main, LmEvalOptions, "python -m ws.eval.lm_eval")
