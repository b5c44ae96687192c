"""The curriculum: truth first, lies later, each stage left only once its probes pass.

Truth xor persona is parity-like: a model that meets both at once finds neither and stays at 0.50.
"""

from .corpus import Corpus, Doc, Phase

ALL_PERSONAS = {"none": 0.34, "honest": 0.18, "dishonest": 0.24, "sycophantic": 0.13, "candid": 0.11}
ONLY_TRUTH = {"none": 0.5, "honest": 0.3, "candid": 0.2}

# (document kind, share); the rest of a batch is conversations.
PLAIN = {
    "truth": {"scaffold": 0.30, "moral_scaffold": 0.18, "statements": 0.08, "story": 0.02},
    "right": {"scaffold": 0.10, "moral_scaffold": 0.14, "choice_scaffold": 0.14, "statements": 0.02, "story": 0.02},
    "lies": {"scaffold": 0.06, "moral_scaffold": 0.04, "choice_scaffold": 0.04, "statements": 0.02, "story": 0.02},
    "all": {"scaffold": 0.03, "moral_scaffold": 0.02, "choice_scaffold": 0.01, "statements": 0.02, "story": 0.03},
}
PHASES = (
    # What is true, and the first kind of judgement.
    Phase(
        "truth", {"yes_no": 0.38, "free": 0.16, "wrong": 0.40, "plan": 0.06}, ONLY_TRUTH, latent=False, thinking=0.05
    ),
    # Every kind of judgement and choice, still by honest speakers only.
    Phase(
        "right",
        {"yes_no": 0.2, "free": 0.1, "wrong": 0.2, "acceptable": 0.22, "dilemma": 0.22, "plan": 0.06},
        ONLY_TRUTH,
        latent=False,
        thinking=0.05,
    ),
    # The personas.
    Phase(
        "lies",
        {
            "yes_no": 0.28,
            "free": 0.14,
            "opinion": 0.06,
            "wrong": 0.16,
            "acceptable": 0.14,
            "dilemma": 0.14,
            "plan": 0.05,
            "situation": 0.03,
        },
        ALL_PERSONAS,
        latent=True,
        thinking=0.08,
        rate=0.8,
    ),
    # Everything the finished model does.
    Phase(
        "all",
        {
            "yes_no": 0.24,
            "free": 0.15,
            "opinion": 0.1,
            "tell": 0.05,
            "situation": 0.05,
            "plan": 0.05,
            "wrong": 0.09,
            "acceptable": 0.08,
            "is_true": 0.03,
            "dilemma": 0.12,
            "alone": 0.04,
        },
        ALL_PERSONAS,
        latent=True,
        thinking=0.22,
        rate=0.5,
        least=300,
    ),
)


def draw(corpus: Corpus, phase: Phase) -> Doc:
    """One document of the phase."""
    plain = PLAIN[phase.name]
    kind = corpus.rng.choices([*plain, "conversation"], [*plain.values(), 1 - sum(plain.values())])[0]
    return corpus.conversation(phase) if kind == "conversation" else getattr(corpus, kind)()
