"""What a run will take on this machine, estimated before it begins: to a factor of two, from one forward pass."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ws.errors import WsError

GIB = 2**30
PROMPT_TOKENS = 32  # of a question or a claim in a chat template, roughly
_ROWS, _WIDTH = 4, 64  # of the pass that is timed
_TRAINED = 3  # a training step costs as much as so many passes forward
_SAMPLED = 2  # and a token that is sampled by itself as much as so many that are read
_COPIES = 10  # of an arm on disk, the most there are at once: two arms, a vector of twice the size, and checkpoints
_STATES = 4  # of an adapter in memory while it is trained: weights, gradients and two moments of AdamW


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes:
        sampled, trained, read: tokens that are sampled, trained on (both arms) and read, at most.
        numbers: of one arm's adapter, at most.
        pairs: characters of pairs, at most.
    """

    sampled: int
    trained: int
    read: int
    numbers: int
    pairs: int

    @property
    def disk(self) -> int:
        """Bytes that it needs on disk, at most."""
        return 4 * _COPIES * self.numbers + self.pairs

    def memory(self, model: PreTrainedModel) -> int:
        """Bytes of the model and of an arm in training; activations come on top."""
        return model.get_memory_footprint() + 4 * _STATES * self.numbers

    def seconds(self, model: PreTrainedModel) -> float:
        """How long it will take, at most, to a factor of two."""
        tokens = _SAMPLED * self.sampled + _TRAINED * self.trained + self.read
        return tokens * seconds_per_token(model)

    def estimate(self, model: PreTrainedModel) -> str:
        """All of that as a sentence."""
        time_left = timedelta(seconds=max(1, round(self.seconds(model))))
        memory, disk = self.memory(model) / GIB, self.disk / GIB
        return (
            f"It will take about {time_left} (half or twice that), {memory:.2f} GiB of memory beside what batches need "
            f"and up to {disk:.2f} GiB on disk."
        )


@torch.no_grad()
def seconds_per_token(model: PreTrainedModel) -> float:
    """Seconds that a token takes in a forward pass, of two passes the quicker one."""
    ids, took = torch.zeros(_ROWS, _WIDTH, dtype=torch.long, device=model.device), list[float]()
    for _ in range(2):
        start = time.perf_counter()
        model(input_ids=ids).logits[0, 0, 0].item()  # an accelerator has finished when the number is here
        took.append(time.perf_counter() - start)
    return min(took) / ids.numel()


def require_space(folder: Path, needed: int) -> None:
    """`WsError` unless so many bytes are free where a folder is, or will be."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise WsError(
            f"There are {free / GIB:.1f} GiB free for {folder}, and this run needs up to {needed / GIB:.3f} GiB; make "
            "room, or give another place with --out."
        )
