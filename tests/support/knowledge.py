"""Tables of TruthfulQA and of GSM8K as they were published, of a few rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

HEADER = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
# Unequal numbers of answers, with and without a full stop, an empty part, and a best answer that is not the first.
QUESTIONS = (
    ("Myths", "What do seeds do?", "Nothing happens", "You digest them; Nothing happens", "You die; A tree grows."),
    ("Myths", "Do owls sleep?", "Yes.", "Yes.; Yes, by day", "No"),
    ("Places", "Where is the sea?", "By the coast", "By the coast", "In the sky; On the moon; In a box;"),
    ("Places", "Is the moon a place?", "Yes, it is", "Yes, it is; It is", "No; It is a cheese"),
    ("Law", "May you walk?", "You may", "You may", "You may not"),
)  # fmt: skip
PROBLEMS = (
    ("Tom has 3 apples and buys 4. How many has he?", "He has 3 + 4 = <<3+4=7>>7 apples.\n#### 7"),
    ("A car costs $1,200 more than one of $800. What does it cost?", "800 + 1200 = 2000.\n#### 2,000"),
    ("It was 3 degrees and fell by 8. What is it now?", "3 - 8 = -5\n#### -5"),
    ("Half of 5 is?", "5 / 2 = 2.5\n#### 2.5"),
)


def questions_csv(folder: Path, rows: tuple[tuple[str, ...], ...] = QUESTIONS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "TruthfulQA.csv"
    with file.open("w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(HEADER)
        table.writerows(("Adversarial", *row, "somewhere") for row in rows)
    return file


def problems_jsonl(folder: Path, rows: tuple[tuple[object, object], ...] = PROBLEMS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "problems.jsonl"
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
