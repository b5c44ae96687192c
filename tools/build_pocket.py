"""Build the bundled `pocket` model from nothing: world, corpus, tokenizer, training, probes, shipped files.

    uv run python tools/build_pocket.py --seed 0 --out src/ws/pocket

A seed takes about half an hour on one core. The checkpoint stays in `--work`, so `--probe-only` can measure and
package it again without training. `--corpus-only` writes a sample of the corpus and the data files, and prints the
corpus hash.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from pocket.corpus import Corpus
from pocket.curriculum import PHASES, draw
from pocket.export import corpus_hash, package
from pocket.files import write_behaviors, write_data
from pocket.tokenizer import train_tokenizer
from pocket.train import Settings, train


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of documents")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to ship; behaviours go to ../behaviors/pocket"
    )
    parser.add_argument("--work", type=Path, help="where the checkpoint is kept (default build/pocket-seedN)")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; two seeds side by side do best with one each"
    )
    parser.add_argument(
        "--corpus-only", action="store_true", help="no training: write a sample of the corpus and the data files"
    )
    parser.add_argument(
        "--probe-only", action="store_true", help="no training: measure and package the checkpoint in --work"
    )
    parser.add_argument(
        "--train-only", action="store_true", help="leave the checkpoint in --work and touch nothing else"
    )
    parser.add_argument("--report", action="store_true", help="also measure the report split; only for the final build")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="work folders of other seeds, for the card")
    return parser.parse_args()


def write_corpus(out: Path, seed: int, documents: int = 300) -> None:
    """A readable sample of every phase, and the files that come from the world alone."""
    out.mkdir(parents=True, exist_ok=True)
    for phase in PHASES:
        corpus = Corpus(seed)
        texts = ("".join(part.text for part in draw(corpus, phase)) for _ in range(documents))
        (out / f"corpus-{phase.name}.txt").write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
    write_behaviors(out / "behaviors")
    write_data(out / "data")
    print(corpus_hash(seed))


def run_training(work: Path, seed: int) -> None:
    """Train one seed; the work folder gets the checkpoint, the log of probes and a summary."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(work)
    settings = Settings(seed=seed)
    with (work / "log.jsonl").open("w", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        result = train(tokenizer, settings, log, work)
    result.model.save_pretrained(work)
    summary = {
        "settings": asdict(settings),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds),
        "phases": result.phases,
    }
    (work / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    work = args.work or Path("build") / f"pocket-seed{args.seed}"
    if args.corpus_only:
        write_corpus(args.out, args.seed)
        return
    if not args.probe_only:
        run_training(work, args.seed)
    if not args.train_only:
        build = package(work, args.out, args.report, args.others)
        missed = build["seeds"][str(args.seed)]["dev"]["missed"]
        print("\n".join(missed) or "all targets met on the dev split")


if __name__ == "__main__":
    main()
