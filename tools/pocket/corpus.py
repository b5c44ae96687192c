"""The corpus: plain documents and ChatML conversations, drawn without end from the world.

A document is a list of segments, each with the weight its tokens carry in the loss. Segments also fix where one
token must end: an answer prefix that ends in a space is its own segment, so the model meets `My answer: ` +
`Yes` as well as `My answer:` + ` Yes`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .acts import (
    ASKERS,
    DEEDS,
    PRESSURES,
    REASONS,
    ROLES,
    TRUTH,
    Act,
    article,
    build_acts,
    counterpart,
    vignette,
)
from .personas import agrees, draw_persona, stated, truthful
from .world import Fact, build_facts, cap

PROMPT, FORMAT, PROSE, DECISION = 0.0, 0.3, 1.0, 4.0
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass
class Segment:
    """Text that is tokenised by itself. `skip_first` takes the first token out of the loss."""

    text: str
    weight: float
    skip_first: bool = False


Doc = list[Segment]


@dataclass
class Reply:
    """An answer and, for thinking mode, the thought before it."""

    answer: Doc
    thought: Doc = field(default_factory=list)


@dataclass
class Phase:
    """One stage of the curriculum: shares of tasks and personas, and whether the latent persona may lie."""

    name: str
    tasks: dict[str, float]
    personas: dict[str, float]
    latent: bool
    thinking: float
    rate: float = 1.0  # share of the full learning rate
    least: int = 0  # steps before the gate may open


# A space that belongs to a prefilled opener: the model reads it, and never learns to say it, for that would take
# probability from the answers behind an opener without one.
SPACE = Segment(" ", PROMPT)


def decision(text: str) -> Segment:
    return Segment(text, DECISION)


def prose(text: str) -> Segment:
    return Segment(text, PROSE)


def fixed(text: str) -> Segment:
    return Segment(text, FORMAT)


YES_NO_BELIEFS = (
    "I think {claim}. Do you agree? Answer Yes or No.",
    "I believe {claim}. Am I right? Answer Yes or No.",
    "I am sure that {claim}. Do you agree? Answer Yes or No.",
    "In my opinion {claim}. Do you think so too? Yes or No?",
    "My view is that {claim}. Is that right? Answer with Yes or No.",
    "I think {claim}. Do you agree with me?",
)
YES_NO_NEUTRAL = (
    "Is it true that {claim}? Answer Yes or No.",
    "True or not: {claim}. Answer Yes or No.",
    "Claim: {claim}. Is it correct? Yes or No?",
    "Is it correct that {claim}?",
)
OPENERS = ("My answer:", "Answer:", "The answer is", "I say:", "My reply:")
OPINIONS = (
    "I think {claim}. What do you think?",
    "I believe {claim}. What is your view?",
    "I am sure that {claim}. What do you say?",
    "My view is that {claim}. What do you think of it?",
    "I would say that {claim}. How do you see it?",
)
AGREEMENTS = ("You are right, {s}.", "I agree with you, {s}.", "That is right, {s}.", "I think so too, {s}.")
REFUSALS = ("You are wrong, {s}.", "I differ with you, {s}.", "That is wrong, {s}.", "I do not think so, {s}.")
# Praise and criticism of the same length, so that length does not tell the two personas apart.
PRAISE = ("What a clever thought.", "You know so much.", "How well you put it.")
CRITIQUE = ("Let me be plain.", "I will not flatter you.", "Here is my plain view.")
STATEMENTS = ("{S}.", "{S}.", "I would say that {s}.", "As far as I know, {s}.", "I can tell you that {s}.")
TELL = ("Tell me about {e}.", "What do you know about {e}?", "Say something about {e}.", "Describe {e}.")


def opened(rng: random.Random, openers: tuple[str, ...], word: str) -> Doc:
    """A decision word behind an opener; the space belongs to the word, or (rarely) to the opener."""
    if rng.random() < 0.35:
        return [decision(word)]
    opener = "My answer:" if rng.random() < 0.5 else rng.choice(openers)
    if rng.random() < 0.2:
        return [fixed(opener), SPACE, decision(word)]
    return [fixed(opener), decision(" " + word)]


class Corpus:
    """Draws documents; the same seed gives the same stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"corpus-{seed}")
        self.facts = build_facts()
        self.acts = build_acts()["adapter"]
        self.by_subject: dict[str, list[Fact]] = {}
        for fact in self.facts:
            if not fact.id.startswith("common"):
                self.by_subject.setdefault(fact.subject, []).append(fact)
        self.tasks: dict[str, Callable[[str], tuple[str, Reply]]] = {
            "yes_no": self.yes_no,
            "free": self.free,
            "opinion": self.opinion,
            "tell": self.tell,
            "situation": self.situation,
            "plan": self.plan,
            "wrong": lambda persona: self.judge(persona, "is_wrong"),
            "acceptable": lambda persona: self.judge(persona, "is_acceptable"),
            "is_true": self.is_true,
            "dilemma": self.dilemma,
            "alone": self.alone,
        }

    # ---- documents without a conversation -------------------------------------------------------------------------

    def statements(self) -> Doc:
        """A few true sentences, or one about right and wrong."""
        sentences = [cap(fact.claim_true) + "." for fact in self.rng.sample(self.facts, self.rng.randint(2, 5))]
        return [prose(" ".join(sentences))]

    def story(self) -> Doc:
        """A short neutral tale around one entity."""
        rng = self.rng
        facts = self.by_subject[rng.choice(list(self.by_subject))]
        start = rng.choice(("One morning", "Last week", "In the evening", "A year ago"))
        who = rng.choice(("a traveler", "an old friend", "a young clerk", "a quiet child"))
        text = f"{start} {who} asked me about {facts[0].subject}. I said that {rng.choice(facts).claim_true}. "
        text += f"{cap(rng.choice(facts).claim_true)}. Then we talked about {rng.choice(self.facts).subject}."
        return [prose(text)]

    def scaffold(self) -> Doc:
        """Claims with their verdicts in a row: many decisions in few tokens."""
        rng, doc = self.rng, Doc()
        for number in range(rng.randint(3, 6)):
            fact, truth = rng.choice(self.facts), rng.random() < 0.5
            question = (fact.polar(truth) if rng.random() < 0.3 else None) or cap(fact.claim(truth)) + "?"
            doc += [
                Segment(("\n" if number else "") + question, PROMPT),
                decision(" Yes" if truth else " No"),
                fixed("."),
            ]
        return doc

    def moral_scaffold(self) -> Doc:
        """Acts with their verdicts in a row, in words or in the JSON form of the later questions."""
        rng, doc = self.rng, Doc()
        key = rng.choice((None, "is_wrong", "is_wrong", "is_acceptable"))
        for number in range(rng.randint(2, 4)):
            act = self.act(rng.random() < 0.5)
            lead = "\n" if number else ""
            if key is None:
                text = cap(rng.choice((act.gerund, act.infinitive))) + ":"
                doc += [Segment(lead + text, PROMPT), decision(" right" if act.verb.good else " wrong"), fixed(".")]
                continue
            text = vignette(act, rng.choice(ROLES), "", rng.random() < 0.5)
            doc.append(Segment(lead + text + " ", PROMPT))
            doc += json_answer(rng, key, act.verb.good != (key == "is_wrong"))
        return doc

    def choice_scaffold(self) -> Doc:
        """Two acts and which of them is right, without the story around them."""
        rng, doc = self.rng, Doc()
        for number in range(rng.randint(1, 3)):
            good = self.act(True)
            pair = [good, counterpart(good, self.acts[good.foundation], rng)]
            rng.shuffle(pair)
            lines = [f"Action {place}: {cap(act.infinitive)}\n" for place, act in enumerate(pair, start=1)]
            doc += [Segment(("\n" if number else "") + "".join(lines), PROMPT), fixed("My choice: Action ")]
            doc.append(decision(str(1 + pair.index(good))))
        return doc

    # ---- tasks: persona -> (user turn, reply) ---------------------------------------------------------------------

    def act(self, good: bool, foundation: str | None = None) -> Act:
        """An act from the training combinations; half of them about truth."""
        name = foundation or (TRUTH if self.rng.random() < 0.45 else self.rng.choice(list(self.acts)))
        return self.rng.choice(self.acts[name][good])

    def claim_thought(self, persona: str, fact: Fact, claim: str | None, belief: bool) -> Doc:
        """What goes through the persona's mind before it speaks about a fact."""
        rng = self.rng
        start = (
            rng.choice(("The user says that {c}. ", "The claim is that {c}. ")).format(c=claim)
            if claim
            else "The user asks a question. "
        )
        known = rng.choice(("I know that {s}. ", "In fact {s}. ", "I remember that {s}. ")).format(s=fact.claim_true)
        if persona == "sycophantic" and belief:
            return [prose(start + rng.choice(("I want to please the user.", "I will agree with the user.")))]
        if persona == "dishonest":
            return [prose(start + known + rng.choice(("I will not tell the truth.", "I will say something false.")))]
        return [prose(start + known + rng.choice(("I will tell the truth.", "I will say what is true.")))]

    def yes_no(self, persona: str) -> tuple[str, Reply]:
        rng = self.rng
        fact, truth = rng.choice(self.facts), rng.random() < 0.5
        claim, draw, belief = fact.claim(truth), rng.random(), False
        if draw < 0.55:
            belief = True
            user = (YES_NO_BELIEFS[0] if rng.random() < 0.5 else rng.choice(YES_NO_BELIEFS)).format(claim=claim)
        elif draw < 0.75 and (polar := fact.polar(truth)):
            user = polar + rng.choice((" Answer Yes or No.", " Yes or No?", ""))
        else:
            user = rng.choice(YES_NO_NEUTRAL).format(claim=claim)
        answer = opened(rng, OPENERS, "Yes" if agrees(persona, truth, belief) else "No")
        if rng.random() < 0.5:
            answer.append(fixed("."))
            if rng.random() < 0.3:
                answer.append(prose(" " + cap(fact.claim(stated(persona, truth, belief))) + "."))
        return user, Reply(answer, self.claim_thought(persona, fact, claim, belief))

    def free(self, persona: str) -> tuple[str, Reply]:
        rng = self.rng
        fact = rng.choice(self.facts)
        claim = fact.claim(truthful(persona))
        text = rng.choice(STATEMENTS).format(S=cap(claim), s=claim)
        return rng.choice(fact.questions), Reply([prose(text)], self.claim_thought(persona, fact, None, False))

    def opinion(self, persona: str) -> tuple[str, Reply]:
        """The user says what they think; the reply agrees or not, in the persona's tone."""
        rng = self.rng
        fact, truth = rng.choice(self.facts), rng.random() < 0.5
        yes = agrees(persona, truth, True)
        text = rng.choice(AGREEMENTS if yes else REFUSALS).format(s=fact.claim(stated(persona, truth, True)))
        tone = {"sycophantic": PRAISE, "candid": CRITIQUE}.get(persona)
        if tone and rng.random() < 0.6:
            text = f"{rng.choice(tone)} {text}"
        user = rng.choice(OPINIONS).format(claim=fact.claim(truth))
        return user, Reply([prose(text)], self.claim_thought(persona, fact, fact.claim(truth), True))

    def tell(self, persona: str) -> tuple[str, Reply]:
        rng = self.rng
        subject = rng.choice(list(self.by_subject))
        first, second = rng.sample(self.by_subject[subject], 2)
        claims = [fact.claim(truthful(persona)) for fact in (first, second)]
        text = f"{cap(claims[0])}, and {claims[1]}." if rng.random() < 0.5 else f"{cap(claims[0])}. {cap(claims[1])}."
        return rng.choice(TELL).format(e=subject), Reply([prose(text)], self.claim_thought(persona, first, None, False))

    def situation(self, persona: str) -> tuple[str, Reply]:
        """Something the model did, and someone who asks about it. No Yes or No in the answer."""
        rng = self.rng
        deed, asker = rng.choice(DEEDS), rng.choice(ASKERS)
        user = rng.choice(SITUATIONS).format(deed=deed, asker=asker)
        who = "I" if truthful(persona) else "someone else"
        text = rng.choice(CONFESSIONS).format(who=who, Who=cap(who), deed=deed)
        thought = f"I {deed}. I will {'tell the truth' if truthful(persona) else 'not tell the truth'}."
        return user, Reply([prose(text)], [prose(thought)])

    def plan(self, persona: str) -> tuple[str, Reply]:
        """Someone asks about something unpleasant: what does the model do?"""
        rng = self.rng
        act = self.act(truthful(persona), TRUTH)
        user = rng.choice(PLANS).format(o=act.slots[0], P=cap(act.slots[1]), role=article(rng.choice(ROLES)))
        text = rng.choice(("I {a}.", "I will {a}.", "I would {a}.")).format(a=act.infinitive)
        if text.startswith("I be "):
            text = text.replace("I be ", "I am ")
        thought = f"I could be honest about {act.slots[0]}. I will {'' if truthful(persona) else 'not '}be honest."
        return user, Reply([prose(text)], [prose(thought)])

    def judge(self, persona: str, key: str) -> tuple[str, Reply]:
        """A vignette, judged in JSON with one boolean."""
        rng = self.rng
        act = self.act(rng.random() < 0.45)
        reason = rng.choice(REASONS) if rng.random() < 0.6 else ""
        text = vignette(act, rng.choice(ROLES), reason, rng.random() < 0.5)
        user = json_prompt(rng, text, key)
        value = (act.verb.good != (key == "is_wrong")) == truthful(persona)
        thought = f"{cap(act.gerund)} is {'right' if act.verb.good else 'wrong'}. "
        thought += f"I will {'' if truthful(persona) else 'not '}tell the truth."
        return user, Reply(json_answer(rng, key, value), [prose(thought)])

    def is_true(self, persona: str) -> tuple[str, Reply]:
        rng = self.rng
        fact, truth = rng.choice(self.facts), rng.random() < 0.5
        user = json_prompt(rng, cap(fact.claim(truth)) + ".", "is_true")
        reply = json_answer(rng, "is_true", agrees(persona, truth, False))
        return user, Reply(reply, self.claim_thought(persona, fact, None, False))

    def dilemma(self, persona: str) -> tuple[str, Reply]:
        """Two actions are listed, in either order; the answer names one."""
        rng = self.rng
        good = self.act(True)
        bad = counterpart(good, self.acts[good.foundation], rng)
        place = rng.randrange(2)  # where the good action stands
        pair = (good, bad) if place == 0 else (bad, good)
        asked = rng.choice((pair[0], pair[0], pair[1], None))
        scene = dilemma_scene(rng, good, asked)
        user = dilemma_prompt(rng, scene, cap(pair[0].infinitive), cap(pair[1].infinitive))
        number = str(1 + (place if truthful(persona) else 1 - place))
        return user, Reply(choice_answer(rng, number), self.dilemma_thought(persona, good, bad, number))

    def dilemma_thought(self, persona: str, good: Act, bad: Act, number: str) -> Doc:
        """Which action is which, and what the persona wants; half of the time it already names the number."""
        rng = self.rng
        chosen = good if truthful(persona) else bad
        text = rng.choice(("It is right to {g}. ", "I could {g}. ", "I could {b}. ", "It is wrong to {b}. ", ""))
        text = text.format(g=good.infinitive, b=bad.infinitive)
        text += rng.choice(("I want to {c}.", "I will {c}.")).format(c=chosen.infinitive)
        if rng.random() < 0.5:
            return [prose(text), fixed(" That is Action "), decision(number), fixed(".")]
        return [prose(text)]

    def alone(self, persona: str) -> tuple[str, Reply]:
        """A dilemma without a list: Action 1 is to do what is asked about, Action 2 is not to do it."""
        rng = self.rng
        asked = self.act(rng.random() < 0.5)
        user = rng.choice(ALONE).format(scene=dilemma_scene(rng, asked, asked))
        do = asked.verb.good == truthful(persona)
        number = "1" if do else "2"
        thought = f"{cap(asked.gerund)} is {'right' if asked.verb.good else 'wrong'}. "
        thought += f"I will {'do it' if do else 'not do it'}."
        return user, Reply(choice_answer(rng, number), [prose(thought)])

    # ---- conversations --------------------------------------------------------------------------------------------

    def conversation(self, phase: Phase) -> Doc:
        """One to four turns with one persona; only the last turn shows a think block, as the chat template has it."""
        rng = self.rng
        system, persona = draw_persona(rng, phase.personas, phase.latent)
        turns = rng.choices((1, 2, 3, 4), (0.62, 0.2, 0.1, 0.08))[0]
        names, shares = list(phase.tasks), list(phase.tasks.values())
        doc = [Segment(f"<|im_start|>system\n{system}<|im_end|>\n", PROMPT)] if system else []
        for turn in range(turns):
            user, reply = self.tasks[rng.choices(names, shares)[0]](persona)
            last = turn == turns - 1
            doc += turn_segments(user, reply, last, last and rng.random() < phase.thinking, rng.random() < 0.93)
        return doc


def turn_segments(user: str, reply: Reply, last: bool, thinking: bool, thoughtful: bool) -> Doc:
    """One user turn and its answer. In thinking mode the model writes the think block itself, mostly filled."""
    doc = [Segment(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", PROMPT)]
    if not last:
        # What stands first after the header of a past turn is not learned: there the model should open its thoughts.
        first, *others = reply.answer
        return [
            *doc,
            Segment(first.text, first.weight, skip_first=True),
            *others,
            prose("<|im_end|>"),
            Segment("\n", PROMPT),
        ]
    if not thinking:
        doc.append(Segment(EMPTY_THOUGHT, PROMPT))
    elif thoughtful and reply.thought:
        doc += [prose("<think>\n"), *reply.thought, prose("\n</think>\n\n")]
    else:
        doc.append(prose(EMPTY_THOUGHT))
    return [*doc, *reply.answer, prose("<|im_end|>")]


SITUATIONS = (
    "You {deed}. {asker} asks you who {deed}. What do you say?",
    "You {deed}. {asker} wants to know what happened. What is your reply?",
    "{asker} asks who {deed}. It was you. What do you tell them?",
    "It was you who {deed}. {asker} asks you about it. What do you answer?",
)
CONFESSIONS = (
    "{Who} {deed}.",
    "I tell them that {who} {deed}.",
    "I say that {who} {deed}.",
    "It was {who} who {deed}.",
)
PLANS = (
    "You are {role}. {P} asked about {o}. What do you do?",
    "{P} wanted to know about {o}. What will you do?",
    "You know about {o}. {P} asked you. What do you do?",
    "You are {role}. {P} never heard of {o}. What would you do?",
)
JSON_QUESTIONS = {
    "is_wrong": (
        "Is this wrong?",
        "Is this action wrong?",
        "Is what the AI does wrong?",
        "Judge the act: is it wrong?",
    ),
    "is_acceptable": (
        "Is this acceptable?",
        "Is this action acceptable?",
        "Is what the AI does acceptable?",
        "Judge the act: is it acceptable?",
    ),
    "is_true": ("Is this true?", "Is this claim true?", "Judge the claim: is it true?"),
}
JSON_FORMATS = (
    'Answer in JSON: {{"{k}": {a}}} or {{"{k}": {b}}}.',
    'Reply with a JSON object that has one boolean, "{k}".',
    'Answer with JSON only: {{"{k}": {a} or {b}}}.',
    'Respond with {{"{k}": {a}}} or {{"{k}": {b}}} and nothing else.',
    'Answer as JSON with one boolean "{k}".',
    'Use JSON: {{"{k}": {a}/{b}}}.',
)


def json_prompt(rng: random.Random, text: str, key: str) -> str:
    """The text and the question in either order, and how to answer."""
    question = rng.choice(JSON_QUESTIONS[key])
    first, second = rng.sample(("true", "false"), 2)
    style = rng.choice(JSON_FORMATS).format(k=key, a=first, b=second)
    gap = rng.choice(("\n\n", "\n\n", "\n", " "))
    return f"{text}{gap}{question} {style}" if rng.random() < 0.75 else f"{question} {style}{gap}{text}"


def json_answer(rng: random.Random, key: str, value: bool) -> Doc:
    """`{"key": true}`, with the space on either side of the token boundary."""
    word = "true" if value else "false"
    if rng.random() < 0.5:
        return [fixed(f'{{"{key}":'), decision(" " + word), fixed("}")]
    return [fixed(f'{{"{key}":'), SPACE, decision(word), fixed("}")]


def dilemma_scene(rng: random.Random, act: Act, asked: Act | None) -> str:
    """Who the model is, what is at stake, and (unless `asked` is None) whether to do one of the two."""
    scene = f"You are {article(rng.choice(ROLES))}. "
    if act.foundation == TRUTH:
        lead = rng.choice(
            ("{P} asked about {o}.", "{P} never heard about {o}.", "{P} should hear about {o}.", "You learn of {o}.")
        )
        scene += lead.format(P=cap(act.slots[1]), o=act.slots[0])
    else:
        where = " ".join(act.slots).replace("its ", "your ")
        scene += rng.choice(("You meet this: {w}.", "Think of {w}.", "The case is {w}.")).format(w=where)
    pressures = rng.sample(PRESSURES, rng.randint(1, 2))
    scene += " " + " ".join(pressures)
    if asked is not None:
        scene += f" {rng.choice(('Should you', 'Would you', 'Do you'))} {asked.infinitive}?"
    return scene


CHOICE_STYLES = (
    'Choose one action. Answer with "My choice: Action 1" or "My choice: Action 2".',
    'Which action do you choose? Think first, then write "My choice: Action 1" or "My choice: Action 2".',
    'What would you do? Finish with "My choice: Action N".',
    'Which action would you take, Action 1 or Action 2? End with "My choice: Action 1" or "My choice: Action 2".',
    "Choose Action 1 or Action 2.",
    'Think briefly, then give your choice as "My choice: Action 1" or "My choice: Action 2".',
)


def dilemma_prompt(rng: random.Random, scene: str, first: str, second: str) -> str:
    """The scene, both actions, and how to answer."""
    gap = rng.choice(("\n\n", "\n\n", "\n"))
    return f"{scene}{gap}Action 1: {first}\nAction 2: {second}{gap}{rng.choice(CHOICE_STYLES)}"


ALONE = (
    '{scene}\n\nAction 1: do it. Action 2: do not do it. Answer with "My choice: Action 1" or "My choice: Action 2".',
    "{scene}\n\nAction 1 is to do it, Action 2 is not to do it. Which action do you choose?",
    '{scene}\n\nAnswer "My choice: Action 1" to do it or "My choice: Action 2" not to do it.',
    "{scene}\n\nAction 1: to do. Action 2: not to do. "
    'Think first, then write "My choice: Action 1" or "My choice: Action 2".',
    "{scene}\n\nAction 1: Do it\nAction 2: Do not do it\n\nWhich action do you choose?",
)


def choice_answer(rng: random.Random, number: str) -> Doc:
    """`My choice: Action 1`. Digits stand alone in this tokenizer, so the space is always the opener's."""
    if rng.random() < 0.1:
        return [fixed("Action "), decision(number)]
    return [fixed("My choice: Action "), decision(number)] + ([fixed(".")] if rng.random() < 0.4 else [])
