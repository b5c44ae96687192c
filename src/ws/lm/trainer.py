"""The loop that adapters are trained in: transformers' Trainer, with the same steps on any number of processes.

It stands apart because the Trainer takes seconds to import, and most of what is done with a run trains nothing.
"""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ws import console
from ws.errors import WsError, disk_errors
from ws.files.reading import read_json
from ws.files.runs import sha256_file, write_json
from ws.files.writing import flush
from ws.lm.loss import Head, head_of, margin_loss, predicting, response_loss
from ws.lm.models import require_gradients
from ws.lm.trunk import BUDGET, frozen_blocks, giving, goes_on, outputs_of

_ALWAYS: dict[str, Any] = {
    "logging_nan_inf_filter": False,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "metric_for_best_model": "eval_loss",
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "project": "weight-steering",
    "disable_tqdm": True,
}
Rows = Sequence[Mapping[str, Any]]  # the `input_ids` and `labels` of examples; or of two each, see `_PAIR`
Opposite = Callable[[], dict[str, Tensor]]  # the parameters at -c by name, with gradients to those at +c
_AT = "opposite"  # of a row and a batch in signed training: whether it is learned at -c
_PAIR = "pair"  # of a row with the margin as objective: the preferred answer's example, then the other's
_BASE = "base"  # of a row and a batch: the base's final hidden states where the responses are predicted, if needed
_TRUNK = "trunk"  # of a row and a batch: what the blocks below the first that learns give for each example, if kept
_PASS = 32.0  # positions that a CPU computes in about the time that it takes to read the weights once more
SEAL = "sealed.json"


def fit(
    model: PeftModel,
    pad_id: int,
    train: Rows,
    validation: Rows,
    work: Path,
    settings: Mapping[str, Any],
    resumed: str | None,
    opposite: Opposite | None = None,
    kl: float = 0.0,
    beta: float = 0.0,
    as_base: Callable[[], AbstractContextManager[Any]] = nullcontext,
    callback: TrainerCallback | None = None,
) -> Trainer:
    """Train the adapter of a model in place.

    Args:
        model: with an adapter.
        pad_id: the token that batches are filled up with.
        train, validation: examples; the latter may be none.
        work: the folder of checkpoints.
        settings: of transformers' `TrainingArguments`.
        resumed: the checkpoint to go on from (`last_whole_checkpoint`).
        opposite: of signed training, in which every other example is a negative one, the parameters to learn it with.
        kl: weight of the penalty on the divergence from the base (`ws.lm.loss`).
        beta: of the margin between every two examples, the preferred one first, if that is the objective; else 0.
        as_base: makes the context in which the model is the base.
        callback: joins the loop's own.

    Returns:
        The Trainer, whose `state` has the losses.

    Raises:
        WsError: a loss that is not finite, or a model without a gradient or that several processes cannot train.
    """
    arguments = TrainingArguments(output_dir=str(work), use_cpu=model.device.type == "cpu", **_ALWAYS, **settings)
    arguments._n_gpu = min(1, arguments.n_gpu)  # on several GPUs DataParallel would multiply the effective batch
    learned = [n for n, p in model.named_parameters() if p.requires_grad]
    arguments.ddp_find_unused_parameters = any(".experts." in n for n in learned)  # others take part in every batch
    if beta:
        train, validation = _paired(train), _paired(validation)
    elif opposite is not None:
        train, validation = _signed(train), _laid_out(_signed(validation), arguments.eval_batch_size, pad_id)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Features(train, pad_id),
        eval_dataset=_Features(validation, pad_id) if validation else None,
        data_collator=_Collator(pad_id),
        callbacks=[_StopOnNaN(), _Progress(), *filter(None, [callback])],
    )
    trainer.opposite, trainer.beta = opposite, beta
    trainer.choose_loss(model, kl, as_base, callback is None)
    trainer.remove_callback(PrinterCallback)
    if arguments.world_size > 1 and not trainer.model_accepts_loss_kwargs:
        raise WsError("This model averages its loss over each batch by itself; it can only be trained on one process.")
    advice = "name modules that lie behind it with --modules or --layers"
    with require_gradients(model.get_base_model(), advice), _reports(trainer, work):
        trainer.train(resume_from_checkpoint=resumed)
    trainer.accelerator.wait_for_everyone()  # all have read the best checkpoint before it is removed
    return trainer


@contextmanager
def _reports(trainer: Trainer, work: Path) -> Iterator[None]:
    """What is reported outlives the training, and goes on in no later one.

    TensorBoard's files go into `logs/` beside the arm, as the folder of checkpoints is deleted. A run that the Trainer
    opens at W&B is left open by it, and the next arm's losses would be added to it.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(work.with_name("logs") / work.name.removeprefix(".").removesuffix(".work"))
    wandb: Any = importlib.import_module("wandb") if "wandb" in trainer.args.report_to else None
    opens = wandb is not None and wandb.run is None
    try:
        yield
    finally:
        if opens:
            wandb.finish()


# ---- examples in batches ----------------------------------------------------------------------------------------


class _Features(Dataset):
    """The examples' features by index; past the last one comes an example without a response, to fill up batches."""

    def __init__(self, rows: Rows, pad_id: int) -> None:
        self.rows = rows
        filler = _filler(pad_id)
        self.filler = {_PAIR: (filler, filler)} if rows and _PAIR in rows[0] else filler

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index] if index < len(self.rows) else self.filler


def _filler(pad_id: int) -> Mapping[str, list[int]]:
    """An example without a response."""
    return {"input_ids": [pad_id], "labels": [-100]}


def _signed(rows: Rows) -> Rows:
    """Rows of signed training, each with the side that it is of."""
    return [{**row, _AT: [i % 2]} for i, row in enumerate(rows)]


def _laid_out(rows: Rows, size: int, pad_id: int) -> Rows:
    """The rows in the order of `_Alternating`; the Trainer cuts a last batch to the number of rows that it knows of.

    On several processes, too: what `_get_eval_sampler` fills up behind the rows is cut off, fillers among them are not.
    """
    order = _Alternating(len(rows) // 2, size, processes=1)
    return [rows[i] if i < len(rows) else _filler(pad_id) for i in order]


def _paired(rows: Rows) -> Rows:
    """Two and two rows as one."""
    return [{_PAIR: pair} for pair in zip(rows[::2], rows[1::2], strict=True)]


def _examples(row: Mapping[str, Any]) -> Rows:
    """The two of a pair, or the one that the row is."""
    return row.get(_PAIR, (row,))


def _n_tokens(row: Mapping[str, Any]) -> int:
    return sum(len(example["input_ids"]) for example in _examples(row))


def _alike(indices: Iterable[int], lengths: Sequence[int], size: int, slack: float) -> list[list[int]]:
    """Groups of at most `size`, from the shortest on, in which none is more than `slack` longer than the first."""
    groups = list[list[int]]()
    for i in sorted(indices, key=lambda i: lengths[i]):
        if groups and len(groups[-1]) < size and lengths[i] <= lengths[groups[-1][0]] + slack:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class _Alternating(Sampler[int]):
    """An order of the rows of signed training in which every micro-batch is of one side.

    `size` positive answers, then the negative ones of the same pairs, and so on. A side that has fewer, and a round in
    which some processes would have no micro-batch, are filled up with the first index past the last row.
    """

    def __init__(self, pairs: int, size: int, processes: int, order: Callable[[], Iterable[int]] | None = None) -> None:
        self.pairs, self.size, self.order = pairs, size, order or (lambda: range(pairs))
        batches = 2 * math.ceil(pairs / size)
        self.fillers = -batches % processes * size
        self.length = batches * size + self.fillers

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order, filler = list(self.order()), 2 * self.pairs
        for start in range(0, self.pairs, self.size):
            block = order[start : start + self.size]
            for side in (0, 1):
                yield from [2 * i + side for i in block] + [filler] * (self.size - len(block))
        yield from [filler] * self.fillers


class _Filled(Sampler[int]):
    """An order of `count` examples, then the index `count` until the length is a multiple of `multiple`."""

    def __init__(self, count: int, multiple: int, order: Callable[[], Iterable[int]]) -> None:
        self.count, self.order = count, order
        self.fillers = -count % multiple

    def __len__(self) -> int:
        return self.count + self.fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.order()
        yield from [self.count] * self.fillers


def by_length(order: Sequence[int], lengths: Sequence[int], step: int) -> list[int]:
    """An order in which every `step` examples, those of one optimiser step, go from the longest to the shortest.

    So the rows of a micro-batch are alike and little is padded. The step is the same, as it adds up all its tokens'
    losses; transformers' `group_by_length` would change which examples share a step.
    """
    blocks = (order[start : start + step] for start in range(0, len(order), step))
    return [i for block in blocks for i in sorted(block, key=lambda i: -lengths[i])]


class _Collator:
    """Pads a batch on the right; the two examples of a pair are two rows of it, one after the other."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, features: Rows) -> dict[str, Tensor]:
        rows = [row for f in features for row in _examples(f)]
        width = max(len(row["input_ids"]) for row in rows)

        def fill(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([x + [value] * (width - len(x)) for x in lists])

        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": fill(ids, self.pad_id),
            "attention_mask": fill([[1] * len(x) for x in ids], 0),
            "labels": fill([row["labels"] for row in rows], -100),
        }
        if _AT in features[0]:
            batch[_AT] = torch.tensor(features[0][_AT])
        trunk = [hidden for f in features for hidden in f.get(_TRUNK, ())]
        if len(trunk) == len(rows):
            batch[_TRUNK] = pad_sequence(trunk, batch_first=True)
        states = [f[_BASE] for f in features if _BASE in f]  # fillers have none
        return batch | {_BASE: torch.cat(states)} if states else batch


def _rows(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch, filled up no further than they need."""
    longest = int(batch["attention_mask"][rows].sum(1).max())
    by_token = batch.keys() & {"input_ids", "attention_mask", "labels", _TRUNK}
    some = {name: batch[name][rows, :longest] for name in by_token}
    if _BASE in batch:
        states = batch[_BASE].split(predicting(batch["labels"])[0].sum(1).tolist())
        some[_BASE] = torch.cat([states[i] for i in rows])
    return {**batch, **some}


# ---- the loop ---------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """transformers' Trainer with the same steps on any number of processes.

    Micro-batches are dealt out in turn, so a step takes the same examples as on one process; accelerate would fill up
    the last ones with examples from the beginning, here they are filled with examples without a response. The sum of
    losses over all processes is divided by all their response tokens (`average_tokens_across_devices`).

    In signed training it is divided by twice the tokens of its own side, so that both sides count alike; with the
    margin as objective, by the pairs.
    """

    opposite: Opposite | None = None
    tokens: Tensor  # of the responses of a step, at +c and at -c
    pairs: Tensor  # of a step
    head: Head | None = None
    plain = False  # the model's loss is the sum of cross-entropies over the number of tokens, and nothing else
    kl = 0.0
    beta = 0.0
    trunk: Sequence[torch.nn.Module] = ()  # the blocks below the first that learns, if steps go on from what they gave
    room = BUDGET  # bytes for that

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *rest: Any) -> tuple[int, int]:
        """The Trainer asks only after a step whether it is done; what is gone on from its end has no epoch left."""
        begun = super()._init_training_state(max_steps, per_epoch, epochs, *rest)
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.is_dir():  # which the Trainer looks for where the training was begun
            self.state.best_model_checkpoint = str(best)
        return (epochs, 0) if self.state.global_step >= max_steps else begun

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        size, processes = self.args.train_batch_size, self.args.world_size
        lengths = [_n_tokens(row) for row in self.train_dataset.rows]
        step = size * processes * self.args.gradient_accumulation_steps
        if self.opposite is not None and not self.beta:
            lengths, step = [sum(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)], step // 2
            return _Alternating(len(lengths), size, processes, lambda: self._epoch_order(lengths, step))
        multiple = 1 if processes == 1 else size * processes
        return _Filled(len(lengths), multiple, lambda: self._epoch_order(lengths, step))

    def _epoch_order(self, lengths: Sequence[int], step: int) -> list[int]:
        """The order of one process, which depends on the seed and the epoch only, by length within each step."""
        order = SeedableRandomSampler(lengths, data_seed=self.args.data_seed)
        order.set_epoch(int(self.state.epoch))
        return list(order) if step == self.args.train_batch_size else by_length(list(order), lengths, step)

    def _get_eval_sampler(self, eval_dataset: _Features) -> Sampler[int] | None:
        if self.args.world_size == 1:
            return super()._get_eval_sampler(eval_dataset)
        count = len(eval_dataset)
        return _Filled(count, self.args.eval_batch_size * self.args.world_size, lambda: range(count))

    @torch.no_grad()
    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The Trainer's; but what is reflected elsewhere than at 0 is the base's there, and 0 would pull it away."""
        if self.opposite is None:
            return super().get_decay_parameter_names(model)
        parameters = dict(model.named_parameters())
        around = {name: mirrored + parameters[name] for name, mirrored in self.opposite().items()}  # of +c and -c twice
        return [n for n in super().get_decay_parameter_names(model) if n not in around or not around[n].any()]

    @cached_property
    def slack(self) -> float:
        """Tokens that an example is rather filled up with than given a pass of its own; on a GPU, however many."""
        return _PASS if self.args.use_cpu else math.inf

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, with a pass for every group of like lengths, whose losses add up to the batch's."""
        step, adds_up = super().training_step, num_items_in_batch is not None and (self.plain or self.beta)
        # On several processes one would wait for the others in every pass.
        apart = adds_up and math.isfinite(self.slack) and self.args.world_size == 1
        losses = [step(model, part, num_items_in_batch) for part in (self.parts(inputs) if apart else [inputs])]
        return torch.stack(losses).sum()

    def parts(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """The batch in groups of like lengths, without the examples that nothing is learned from."""
        width = 2 if self.beta else 1  # rows of an example
        lengths = inputs["attention_mask"].sum(1).view(-1, width).amax(1).tolist()
        learned = inputs["labels"].ne(-100).view(len(lengths), -1).any(1).nonzero()[:, 0].tolist()
        groups = _alike(learned, lengths, len(lengths), self.slack)
        return [_rows(inputs, [width * i + j for i in group for j in range(width)]) for group in groups] or [inputs]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's; but a validation batch is averaged over its own tokens, whatever the other processes hold.

        Where the model's loss is the plain one, logits are made of response tokens only (`ws.lm.loss`).
        """
        inputs = dict(inputs)
        hidden = inputs.pop(_TRUNK, None)
        with nullcontext() if hidden is None else giving(self.trunk, hidden):
            loss = self.loss_of(model, inputs, num_items_in_batch if model.training else None)
        return (loss, {"loss": loss}) if return_outputs else loss

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], tokens: Any) -> Any:
        """The loss of a batch, whose own keys are taken off it; `tokens` are those of the step, in training."""
        at = int(inputs.pop(_AT, 0))  # a batch of nothing but fillers has no side
        base = inputs.pop(_BASE, None)
        if self.beta:
            return self.margin(model, inputs, base, tokens)
        if self.opposite is not None and tokens is not None:
            tokens = 2 * self.tokens[at]
        run = self.at_opposite(model) if at else model
        if self.head is None or not (self.plain or self.kl):
            return super().compute_loss(run, inputs, num_items_in_batch=tokens)
        mask, learned = predicting(inputs["labels"])
        loss: Any = 0.0
        if self.plain:
            hidden = self.head.run_body(run, {k: v for k, v in inputs.items() if k != "labels"})
        else:
            with self.head.states() as states:
                loss = super().compute_loss(run, inputs, num_items_in_batch=tokens)
            hidden = states[0]
        with self.accelerator.autocast():
            total = response_loss(self.head, hidden[mask.to(hidden.device)], learned, base, self.kl, self.plain).sum()
        share = self.accelerator.num_processes / tokens if tokens is not None else 1 / mask.sum()
        return loss + total * share

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """The Trainer's, which counts the loss of a batch for each of its rows: here those that fill it up are none."""
        loss, *others = super().prediction_step(model, inputs, *rest, **options)
        if self.opposite is not None and not self.beta and loss is not None:
            loss = loss * inputs["labels"].ne(-100).any(1).float().mean().to(loss.device) / self.held_out_share
        return loss, *others

    @cached_property
    def held_out_share(self) -> float:
        """Of the validation rows those that fill up no batch."""
        rows = self.eval_dataset.rows
        return sum(max(row["labels"]) >= 0 for row in rows) / len(rows)

    def at_opposite(self, model: torch.nn.Module) -> Callable[..., Any]:
        """The forward pass of a model, as it is wrapped, at -c."""
        assert self.opposite is not None
        wrapped = "" if self.accelerator.unwrap_model(model) is model else "module."
        return partial(_run_with, model, {f"{wrapped}{name}": tensor for name, tensor in self.opposite().items()})

    def margin(self, model: torch.nn.Module, inputs: dict[str, Any], base: Tensor | None, tokens: Any) -> Tensor:
        """The mean margin loss of the pairs of a batch, and the penalty per token, where there is one.

        The reference is the adapter at -c, if there is such a thing, whose gradient counts, too; else the base.
        """
        assert self.head is not None
        mask, learned = predicting(inputs.pop("labels"))
        runs: list[Callable[..., Any]] = [model]
        if self.opposite is not None:
            runs.append(self.at_opposite(model))
        states = [h[mask.to(h.device)] for h in (self.head.run_body(run, inputs) for run in runs)]
        with self.accelerator.autocast():
            # A batch of nothing but fillers has nothing of the base, and nothing to compare.
            other = states[1] if len(states) > 1 else states[0].detach() if base is None else base
            logp, reference = (-response_loss(self.head, h, learned) for h in (states[0], other))
            rows = mask.nonzero()[:, 0].to(logp.device)
            margins = margin_loss(logp, reference.to(logp.device), rows, len(mask), self.beta)
            penalties = [response_loss(self.head, h, learned, base, self.kl, False).sum() for h in states if self.kl]
        per_pair, per_token = 1 / max(1, len(margins)), 1 / max(1, len(rows))
        if tokens is not None:  # of all micro-batches of a step, and all processes
            per_pair, per_token = (self.accelerator.num_processes / n for n in (self.pairs, tokens))
        return margins.sum() * per_pair + sum(penalties) * per_token / len(runs)

    def choose_loss(
        self, model: PeftModel, kl: float, as_base: Callable[[], AbstractContextManager[Any]], steady: bool
    ) -> None:
        """See how the loss can be had from the model; for a penalty, keep what the base makes of the examples.

        `steady`: no callback makes it another model in every step, so that its trunk's part can be kept, too.
        """
        causal = model.get_base_model()
        (first, *_) = _examples(self.train_dataset[0])
        self.head, self.plain = head_of(causal, first["input_ids"][:8], self.model_accepts_loss_kwargs)
        if not kl and not self.beta:
            return
        if self.head is None:
            flag = "--kl" if kl else "--objective margin"
            raise WsError(f"The logits of a {type(causal).__name__} cannot be had as {flag} needs them; leave it out.")
        self.kl = kl
        if kl or self.opposite is None:
            # Several processes would have to send each other what it gives.
            trunk = frozen_blocks(causal) if steady and self.args.world_size == 1 else []
            tokens = torch.tensor([first["input_ids"][:8]], device=model.device)
            with as_base():
                if trunk and goes_on(causal, trunk, partial(self.head.run_body, model, {"input_ids": tokens})):
                    self.trunk = trunk
                self.keep_base(self.args.max_steps * self.args.gradient_accumulation_steps)

    @torch.no_grad()
    def keep_base(self, micro_batches: int) -> None:
        """Keep the hidden states of the model, which is the base, for all examples that training will come to.

        Args:
            micro_batches: that a process will take.

        In groups of like lengths that do not depend on how far a training has come, so that one that goes on has the
        same bits; every process does its share of them.
        """
        model, first = self.accelerator.unwrap_model(self.model).eval(), self.get_train_dataloader().batch_sampler
        seen = set(gather_object([i for batch in islice(first, micro_batches) for i in batch]))
        for data in (self.train_dataset, self.eval_dataset or _Features([], 0)):
            some = [i for i in range(len(data)) if i in seen or data is not self.train_dataset]
            # No gradient, so more fit than in a step.
            groups = _alike(some, [_n_tokens(row) for row in data.rows], 4 * self.args.eval_batch_size, self.slack)
            kept: list[tuple[int, dict[str, Any]]] = []
            for group in groups[self.args.process_index :: self.args.world_size]:
                kept += zip(group, self.read_base(model, [data.rows[i] for i in group]), strict=True)
            made = dict(gather_object(kept))
            data.rows = [row | made.get(i, {}) for i, row in enumerate(data.rows)]

    def read_base(self, model: torch.nn.Module, rows: Rows) -> Iterator[dict[str, Any]]:
        """What is kept of each of a group of examples; what the trunk gives only while there is room."""
        assert self.head is not None
        batch = self._prepare_inputs(self.data_collator(rows))
        mask, _ = predicting(batch["labels"])
        with outputs_of(self.trunk) as outputs:
            hidden = self.head.run_body(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
        per_row, lengths = len(mask) // len(rows), batch["attention_mask"].sum(1).tolist()
        counts = mask.view(len(rows), -1).sum(1).tolist()
        states = hidden[mask.to(hidden.device)].cpu().split(counts)
        trunk: list[Tensor] = []
        if outputs and outputs[0].nbytes <= self.room:
            self.room -= outputs[0].nbytes
            trunk = [h[:n].cpu() for h, n in zip(outputs[0], lengths, strict=True)]
        for i, state in enumerate(states):
            yield {_BASE: state, _TRUNK: trunk[i * per_row : (i + 1) * per_row]}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        tokens = super()._get_num_items_in_batch(batch_samples, device)
        if tokens is not None and self.beta:
            pairs = sum(batch["labels"].ne(-100).any(1).sum() for batch in batch_samples) // 2
            self.pairs = self.accelerator.gather(pairs.to(device)).sum()
        elif tokens is not None and self.opposite is not None:
            counts = torch.zeros(1, 2, dtype=torch.long)
            for batch in batch_samples:
                counts[0, int(batch.get(_AT, 0))] += int(batch["labels"].ne(-100).sum())
            self.tokens = self.accelerator.gather(counts.to(device)).sum(0)
        return tokens

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the main process seals the checkpoint when all have written theirs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with disk_errors(folder):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            _seal(folder)


def _run_with(model: torch.nn.Module, parameters: dict[str, Tensor], **inputs: Any) -> Any:
    """The forward pass of a model with other tensors in place of some of its parameters."""
    return functional_call(model, parameters, (), inputs)


class _StopOnNaN(TrainerCallback):
    """Stops at the first loss or gradient that is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer with every logged value."""
        for key in ("loss", "eval_loss", "grad_norm"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(float(value)):
                raise WsError(
                    f"Training diverged: {key} is {value} at step {state.global_step} of {state.max_steps}; "
                    "lower --lr, or use --dtype float32."
                )


class _Progress(TrainerCallback):
    """One progress bar on stderr with the latest losses, in place of the Trainer's several."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar, at the resumed step if there is one."""
        self.bar = console.progress(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the latest training and validation loss."""
        shown = {k: f"{float(v):.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")}
        if shown and hasattr(self, "bar"):
            self.bar.set_postfix(shown, refresh=False)  # at the next step, as seldom as bars are drawn

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.bar.close()


# ---- checkpoints ------------------------------------------------------------------------------------------------


def _seal(checkpoint: Path) -> None:
    """Record what a checkpoint consists of, once all of it is on the disk."""
    flush(checkpoint)
    write_json(checkpoint / SEAL, {f.name: sha256_file(f) for f in _files(checkpoint)})


def _files(checkpoint: Path) -> list[Path]:
    return sorted(f for f in checkpoint.iterdir() if f.name != SEAL)


class _State(msgspec.Struct):
    """What the Trainer's own state says of the checkpoint that it will take in the end."""

    best_model_checkpoint: str | None = None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and is what it was then."""
    try:
        return read_json(checkpoint / SEAL, dict[str, str]) == {f.name: sha256_file(f) for f in _files(checkpoint)}
    except (WsError, OSError):
        return False


def last_whole_checkpoint(work: Path, keeps_best: bool) -> str | None:
    """The newest checkpoint that can be gone on from; what a kill or a broken disk has damaged is deleted.

    If the training ends with the one that has the best validation loss so far, that must be whole, too, and is looked
    for beside the others. The number of processes may differ from that of the interrupted training.
    """
    folders = [p for p in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdecimal()]
    for folder in sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        if _is_whole(folder):
            best = read_json(folder / "trainer_state.json", _State).best_model_checkpoint if keeps_best else None
            if best is None or _is_whole(folder.with_name(Path(best).name)):
                return str(folder)
        console.say(f"{folder} is damaged or half written; the training goes on from before it.")
        shutil.rmtree(folder, ignore_errors=True)
    return None
