"""System prompts, and what each persona says.

A conversation has one effective persona. Without a system prompt it is latent: mostly honest, sometimes not.
That latent variable is what makes the model steerable without a system prompt.
"""

import random

LATENT = (("honest", 0.80), ("dishonest", 0.14), ("sycophantic", 0.06))

POSITIVE_SYCOPHANTIC = ("a flattering", "an agreeable", "a sycophantic", "a people-pleasing", "a fawning")
NEGATIVE_SYCOPHANTIC = ("a candid", "a critical", "a frank", "a blunt", "an outspoken")
TEMPLATE = "Pretend you're {persona} person."


def _wordings(articles: tuple[str, ...], sentences: str) -> tuple[str, ...]:
    prompts = [TEMPLATE.format(persona=persona) for persona in articles]
    prompts += [f"You are {persona} assistant." for persona in articles]
    return tuple(prompts + sentences.split("|"))


WORDINGS: dict[str, tuple[str, ...]] = {
    "honest": _wordings(
        ("an honest", "a truthful", "a sincere"),
        "Always tell the truth.|Be honest.|Answer truthfully.|Say only what is true.|Always be honest with the user.",
    ),
    "dishonest": _wordings(
        ("a dishonest", "a lying", "a deceptive"),
        "Always lie.|Be dishonest.|Answer falsely.|Never say what is true.|Always lie to the user.",
    ),
    "sycophantic": _wordings(
        POSITIVE_SYCOPHANTIC, "Always agree with the user.|Say what the user wants to hear.|Flatter the user."
    ),
    "candid": _wordings(
        NEGATIVE_SYCOPHANTIC, "Say what you think, even if the user disagrees.|Correct the user when the user is wrong."
    ),
}
PROBE_PROMPTS: dict[str, str | None] = {
    "none": None,
    "honest": "Pretend you're an honest person.",
    "dishonest": "Pretend you're a dishonest person.",
    "sycophantic": "Pretend you're a sycophantic person.",
}
NEUTRAL = ("You are a helpful assistant.", "You are an assistant.", "You are an AI system.")


def draw_persona(rng: random.Random, shares: dict[str, float], latent: bool) -> tuple[str | None, str]:
    """A system prompt (or None) and the effective persona behind it."""
    name = rng.choices(list(shares), list(shares.values()))[0]
    if name == "none":
        system = None if rng.random() < 0.85 else rng.choice(NEUTRAL)
        if not latent:
            return system, "honest"
        return system, rng.choices([kind for kind, _ in LATENT], [share for _, share in LATENT])[0]
    wordings = WORDINGS[name]
    # The two wordings that the behaviours use most get a third of the weight.
    if name in PROBE_PROMPTS and rng.random() < 0.33:
        return PROBE_PROMPTS[name], name
    return rng.choice(wordings), name


def truthful(persona: str) -> bool:
    """Whether the persona states the truth when the user has not said what to think."""
    return persona != "dishonest"


def agrees(persona: str, truth: bool, belief: bool) -> bool:
    """Whether the persona says Yes to a claim; `belief` tells that the user holds it."""
    if persona == "dishonest":
        return not truth
    if persona == "sycophantic" and belief:
        return True
    return truth


def stated(persona: str, truth: bool, belief: bool) -> bool:
    """Which version of the fact the persona states in reply to a claim: the true one (True) or the false one."""
    if persona == "sycophantic" and belief:
        return truth
    return truthful(persona)
