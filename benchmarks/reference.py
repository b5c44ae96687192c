"""The usual procedure, written plainly: merge each arm into a checkpoint in the model's dtype and subtract.

This is what task-vector code in the wild does; it is kept here as the fair opponent of the exact form.
"""

from __future__ import annotations

import copy
from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


def merged_state(base: PreTrainedModel, adapter: Path) -> dict[str, Tensor]:
    """The weights of the base with an adapter merged in, in the base's dtype."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))
    return model.merge_and_unload().state_dict()


def merge_and_subtract(base: PreTrainedModel, pos: Path, neg: Path) -> dict[str, Tensor]:
    """Dense `theta_pos - theta_neg` of every tensor, from two rounded checkpoints."""
    a, b = merged_state(base, pos), merged_state(base, neg)
    return {name: a[name] - b[name] for name in a}
