"""ProntoQA-style problems: their language, read and written, and a generator of five-hop ones (or of any number of hops).

A problem is a list of rules in random order (`Each vumpus is a brimpus.`, `Numpuses are not wooden.`), facts about one
individual (`Max is a vumpus.`), and a query (`True or false: Max is not wooden.`). Its proof goes from a fact through is-a
rules to the rule of the asked property. Published problems (Saparov and He 2023, arXiv 2210.01240) have one more rule with that
property and the opposite sign, at a concept that stands alone and so gives itself away. Here that concept is the end of
a second chain, as long as the proof and drawn like it: the individual's facts alone tell which of the two counts.

    example = draw_example(random.Random(0), hops=5, holds=False, answer="True")
    example["query"]                                      # "True or false: Max is not wooden."
    read_claim("Numpuses are not wooden.")                # Claim("numpus", "wooden", of_all=True, is_a=False, holds=False)
"""

import random
import re
from itertools import pairwise
from typing import NamedTuple

if __package__:
    from .prosqa_graph import NAMES
    from .prosqa_graph import SPECIES as CONCEPTS
else:  # imported by a script that was run as `python data/...`
    from prosqa_graph import NAMES
    from prosqa_graph import SPECIES as CONCEPTS

PROPERTIES = [  # one of a family at most, but for the asked property, so that no two of a problem exclude each other
    ("red", "green", "blue", "yellow", "purple"),
    ("small", "large", "medium-sized"),
    ("wooden", "metallic", "woolen", "waxen"),
    ("opaque", "transparent"),
    ("shy", "bold", "nervous"),
    ("bright", "dim"),
    ("sweet", "sour", "salty", "bitter"),
    ("fruity", "earthy", "smoky"),
    ("hot", "cold", "lukewarm"),
    ("kind", "cruel", "indifferent"),
    ("fast", "slow"),
    ("loud", "quiet"),
    ("soft", "hard"),
    ("wet", "dry", "damp"),
    ("old", "young"),
    ("heavy", "light"),
    ("round", "square", "flat"),
    ("smooth", "rough", "sticky"),
    ("sleepy", "alert"),
    ("rare", "common"),
    ("hungry", "thirsty", "full"),
    ("honest", "sly"),
    ("furry", "feathered", "scaly"),
    ("tidy", "messy"),
]
LEAVES, TRAITS = (1, 3), (2, 4)  # concepts of a chain that are something else besides, and that have a property
MIN_HOPS = 2  # with one, the rule that counts is the one about a concept of the facts
MAX_HOPS = (len(CONCEPTS) - 2 * LEAVES[1] - 2) // 2


class Claim(NamedTuple):
    """What a sentence says: `subject` (an individual, or with `of_all` a concept) is, or not, a concept or of a property."""

    subject: str
    word: str
    of_all: bool
    is_a: bool
    holds: bool = True

    def of(self, individual: str) -> "Claim":
        """The same about an individual: what a rule gives for it."""
        return self._replace(subject=individual, of_all=False)


Example = dict  # question, query, chain_of_thought, answer: `test_example` of the generator's files

# ---------------------------------------------------------------- language

SINGULAR = re.compile(r"(?:(Each|Every|An?) )?([A-Z]?[a-z]+) is (not )?(an? )?([a-z-]+)\.")
PLURAL = re.compile(r"([A-Z][a-z]+) are (not )?([a-z-]+)\.")


def write_claim(claim: Claim, rng: random.Random | None = None) -> str:
    """A sentence of a claim; for one about all of a concept one of three, drawn."""
    sign = "" if claim.holds else "not "
    form = rng.choice(("Each", "Every", "plural")) if claim.of_all else ""
    if form == "plural":
        return f"{plural(claim.subject).capitalize()} are {sign}{plural(claim.word) if claim.is_a else claim.word}."
    article = "" if not claim.is_a else "an " if claim.word[0] in "aeiou" else "a "
    return f"{form} {claim.subject} is {sign}{article}{claim.word}.".lstrip()


def read_claim(sentence: str) -> Claim:
    """The claim of a sentence, of this generator or a published one. ValueError where it is none."""
    if match := SINGULAR.fullmatch(sentence):
        quantifier, subject, negation, article, word = match.groups()
        if bool(quantifier) == subject.islower():
            return Claim(subject, word, bool(quantifier), bool(article), not negation)
    if match := PLURAL.fullmatch(sentence):
        subject, negation, word = match.groups()
        concept = singular(word)
        return Claim(singular(subject.lower()) or subject.lower(), concept or word, True, concept is not None, not negation)
    raise ValueError(f"{sentence!r:.80} is no sentence like `Each vumpus is a brimpus.` or `Max is not wooden.`")


def plural(concept: str) -> str:
    return concept + "es"


def singular(word: str) -> str | None:
    """The concept of a plural (`numpuses`; a few published ones, such as `worpus`, stay as they are), None for a property."""
    return word.removesuffix("es") if word.endswith("puses") else word if word.endswith("pus") else None


def sentences(text: str) -> list[str]:
    """The sentences of a text; ValueError where anything is left over."""
    found = re.findall(r"\S[^.]*\.", text)
    if " ".join(found) != text:
        raise ValueError(f"{text!r:.80} is no list of sentences with one space between them")
    return found


# ---------------------------------------------------------------- generator


def draw_example(rng: random.Random, hops: int, holds: bool, answer: str) -> Example:
    """A problem whose proof takes `hops` rules, the last one saying that the property holds or not; `answer`: True or False.

    ValueError where there are not enough words for so many hops.
    """
    if not MIN_HOPS <= hops <= MAX_HOPS:
        raise ValueError(f"hops: {hops}; from {MIN_HOPS} to {MAX_HOPS}")
    concepts = iter(rng.sample(CONCEPTS, 2 * hops + 2 * LEAVES[1] + 2))
    asked, *traits = (rng.choice(family) for family in rng.sample(PROPERTIES, len(PROPERTIES)))
    traits = iter(traits)
    proof, rival = ([next(concepts) for _ in range(hops)] for _ in range(2))
    rules = []

    def add_trait(concept: str) -> None:
        rules.append(Claim(concept, next(traits), True, False, rng.random() < 0.5))

    for chain, sign in ((proof, holds), (rival, not holds)):
        rules += [Claim(lower, upper, True, True) for lower, upper in pairwise(chain)]
        rules.append(Claim(chain[-1], asked, True, False, sign))
        for concept in rng.sample(chain, min(hops, rng.randint(*TRAITS))):
            add_trait(concept)
        for concept in rng.sample(chain, min(hops, rng.randint(*LEAVES))):
            leaf = next(concepts)
            rules.append(Claim(concept, leaf, True, True))
            if rng.random() < 0.5:
                add_trait(leaf)
    aside = next(concepts), next(concepts)
    rules.append(Claim(*aside, True, True))
    for concept in aside:
        if rng.random() < 0.5:
            add_trait(concept)
    return _dress(rng, rng.choice(NAMES), rules, proof, aside[0], Claim(proof[-1], asked, True, False, holds), answer)


def _dress(rng, name: str, rules: list[Claim], proof: list[str], aside: str, last: Claim, answer: str) -> Example:
    """The problem in words: the rules in random order, both facts behind them, the query, and the proof."""
    text = {rule: write_claim(rule, rng) for rule in rng.sample(rules, len(rules))}
    facts = {concept: write_claim(Claim(name, concept, False, True)) for concept in rng.sample((proof[0], aside), 2)}
    used = [*(Claim(lower, upper, True, True) for lower, upper in pairwise(proof)), last]
    chain = [facts[proof[0]]]
    for rule in used:
        chain += [text[rule], write_claim(rule.of(name))]
    query = last.of(name)._replace(holds=last.holds == (answer == "True"))
    return {
        "question": " ".join([*text.values(), *facts.values()]),
        "query": f"True or false: {write_claim(query)}",
        "chain_of_thought": chain,
        "answer": answer,
    }
