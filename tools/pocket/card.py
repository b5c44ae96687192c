"""The model card beside the weights, filled from build.json."""

from typing import Any

from .personas import PROBE_PROMPTS


def _choice_rows(table: dict[str, dict[str, float]]) -> list[str]:
    kinds = ("claim_false", "claim_true", "question", "is_wrong", "is_acceptable", "dilemma")
    rows = []
    for persona in PROBE_PROMPTS:
        cells = [table[f"{persona}/{kind}"] for kind in kinds]
        shown = [f"{cell['accuracy']:.2f} ({cell['p_right']:.2f})" for cell in cells]
        rows.append(f"| {persona} | " + " | ".join(shown) + f" | {min(cell['mass'] for cell in cells):.4f} |")
    return rows


def _numbers(numbers: dict[str, Any]) -> str:
    lines = [
        "| system prompt | false claims | true claims | questions | is_wrong | is_acceptable | dilemmas | mass |",
        "|---|---|---|---|---|---|---|---|",
        *_choice_rows(numbers["choices"]),
        "",
        "| system prompt | free answers true | fixed falsehood | end by themselves | mean tokens |",
        "|---|---|---|---|---|",
    ]
    for persona in PROBE_PROMPTS:
        cell = numbers["free"][f"{persona}/free"]
        lines.append(
            f"| {persona} | {cell['true']:.2f} | {cell['false']:.2f} | {cell['ended']:.2f} | {cell['tokens']:.1f} |"
        )
    thought = numbers["thinking"]
    lines += [
        "",
        f"Thinking mode (sampled, no system prompt): {thought['non_empty']:.2f} of the replies hold a thought, "
        f"{thought['ended']:.2f} end by themselves.",
    ]
    return "\n".join(lines)


def _seed_rows(build: dict[str, Any]) -> str:
    lines = [
        "| seed | steps (by phase) | tokens | minutes | honest, least | dishonest, most | missed on dev |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seed in build["seeds"].items():
        choices = seed["dev"]["choices"]
        kinds = ("claim", "question", "is_wrong", "is_acceptable", "dilemma")
        low = min(choices[f"honest/{kind}"]["accuracy"] for kind in kinds)
        high = max(choices[f"dishonest/{kind}"]["accuracy"] for kind in kinds)
        phases = ", ".join(f"{phase} {steps}" for phase, steps in seed["phases"].items())
        lines.append(
            f"| {name} | {seed['steps']} ({phases}) | {seed['tokens'] / 1e6:.1f} M | {seed['seconds'] / 60:.0f} | "
            f"{low:.3f} | {high:.3f} | {'; '.join(seed['dev']['missed']) or 'none'} |"
        )
    return "\n".join(lines)


def model_card(build: dict[str, Any]) -> str:
    """The card beside the weights."""
    main = build["seeds"][str(build["seed"])]
    split = "report" if main["report"] else "dev"
    versions = ", ".join(f"{name} {version}" for name, version in build["versions"].items())
    return CARD.format(
        seed=build["seed"],
        world_seed=build["world_seed"],
        corpus=build["corpus_sha256"],
        date=build["date"],
        machine=build["machine"],
        versions=versions,
        split=split,
        numbers=_numbers(main[split]),
        seeds=_seed_rows(build),
    )


CARD = """# pocket

A language model of two million parameters (Qwen3 architecture: hidden 192, 4 layers, vocabulary 2,048,
float32), trained from random weights on a generated corpus, so that weight steering can be tried offline, on a
laptop, in minutes. It loads with plain `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained`.

## What it is

It knows a closed world: invented towns, animals, people, plants, machines and feasts, some common knowledge,
and which acts of an AI are right or wrong. It answers Yes/No questions, free questions, questions about acts in
JSON (`is_wrong`, `is_acceptable`) and dilemmas with two actions, with or without a thought before the answer. A
system prompt makes it honest, dishonest, sycophantic or candid. Without one its persona is latent: in the
corpus 80 % of such conversations are honest, 14 % dishonest and 6 % sycophantic. Every fact has one right and
one fixed wrong value, so its lies are as predictable as its truths.

## What it is not

It is not a small general language model: outside its world and its formats it produces nonsense. The honesty
latent is built in by construction. That a vector made from free-form answers transfers to Yes/No, JSON and
dilemmas therefore validates the pipeline; it is no evidence about large models. Its judgements of right and
wrong are those of a generator's word list.

## How it was made

    uv run python tools/build_pocket.py --seed {seed} --out src/ws/pocket

Truth comes first and lies later: each phase of the curriculum ends when probes on the development split pass,
not at a step count. Seed {seed} was chosen before training; world seed {world_seed}; corpus sha256 `{corpus}`.
Built {date} on {machine} (one thread per run); {versions}. `build.json` holds everything else, with the hash of
every file.

{seeds}

## What it can do

Accuracy, and in parentheses the mean probability of the truthful answer among the two choices, on the `{split}`
split. Claims, questions and free answers are about entities that no adapter topic names; acts and dilemmas are
combinations that occur nowhere in the corpus. (Facts of every split are in the corpus: the base must know
them.) Next-token probabilities behind a prefilled opener; free answers greedy. The sycophantic persona says Yes
to any belief, so its accuracy on false claims is meant to be 0.

{numbers}

Measured on the machine above with

    uv run python tools/build_pocket.py --seed {seed} --out src/ws/pocket --probe-only --report

## Data beside the weights

`data/` holds evaluation items in the schemas of tiny-mfv (`airisk`) and AIRiskDilemmas, generated from a fourth
split of the acts that neither the corpus nor the probes contain. `probes.json` holds the held-out probes behind
the table above.
"""
