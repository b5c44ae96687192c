"""Tasks of lm-evaluation-harness that are made on the spot, on five questions of the pocket model's world."""

from __future__ import annotations

import json
from pathlib import Path

DOCUMENTS = [
    {"question": "What does the brusk eat?", "choices": ["roots", "seeds"], "gold": 0},
    {"question": "What is ice?", "choices": ["milk", "frozen water"], "gold": 1},
    {"question": "What color is grass?", "choices": ["green", "purple"], "gold": 0},
    {"question": "What pumps blood?", "choices": ["the nose", "the heart"], "gold": 1},
    {"question": "Where does Ferrow lie?", "choices": ["on a plain", "in a valley"], "gold": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
{asked}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}\""""
WRITTEN = """output_type: generate_until
doc_to_target: "{{choices[gold]}}\""""


def write_documents(file: Path) -> Path:
    """The questions as a task reads them."""
    file.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS), encoding="utf-8")
    return file


def write_task(file: Path, name: str, data: Path, asked: str = CHOICE, more: str = "") -> None:
    """A task's file: `CHOICE` or `WRITTEN`, and lines besides."""
    metric, asked = "acc" if asked == CHOICE else "exact_match", f"{asked}\n{more}".strip()
    text = TASK.format(name=name, data=data, cache=file.parent / "cache", asked=asked, metric=metric)
    file.write_text(text, encoding="utf-8")
