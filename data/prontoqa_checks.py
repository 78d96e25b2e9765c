"""ProntoQA rows: whether they are sound, what is in them, and how far rules get that follow no proof.

    for row in rows:
        check_row(row, hops=5)               # ValueError that says what is wrong
    problems = [read_row(row) for row in rows]
    print(statistics(problems)["rules"], baselines(problems)["first rule of the property"])

The checks read rows of published files, too; their rival rule stands at a concept that nothing leads to, and `more concepts
above` is right in every row of them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property

if __package__:
    from .prontoqa_ontology import Claim, read_claim, sentences
else:  # imported by a script that was run as `python data/...`
    from prontoqa_ontology import Claim, read_claim, sentences

Row = dict
QUERY = " True or false: "

# ---------------------------------------------------------------- reading


class Problem:
    """A row, read: `rules` and `facts` in the order of the text, `query`, `chain` (the proof's sentences), `answer`."""

    def __init__(self, row: Row):
        context, asks, query = row["question"].partition(QUERY)
        if not asks:
            raise ValueError(f"question: no {QUERY.strip()!r} in it")
        self.text = sentences(context)
        claims = [read_claim(sentence) for sentence in self.text]
        self.rules = [claim for claim in claims if claim.of_all]
        self.facts = [claim for claim in claims if not claim.of_all]
        self.query = read_claim(query)
        self.chain = [sentence for step in row["steps"] for sentence in sentences(step)]
        self.answer = row["answer"]

    @property
    def key(self) -> tuple:
        """The same for a problem with its rules in another order or other words, or asked the other way round."""
        return tuple(sorted({*self.rules, *self.facts})), self.query.word

    @cached_property
    def derived(self) -> dict[Claim, int]:
        """What follows about the individual asked, and by how many rules at least."""
        distance = {fact: 0 for fact in self.facts if fact.subject == self.query.subject}
        queue = list(distance)
        for claim in queue:
            for rule in self.rules_of.get(claim.word, []) if claim.is_a and claim.holds else []:
                new = rule.of(claim.subject)
                if new not in distance:
                    distance[new] = distance[claim] + 1
                    queue.append(new)
        return distance

    @cached_property
    def rules_of(self) -> dict[str, list[Claim]]:
        """The rules about each concept."""
        found: dict[str, list[Claim]] = {}
        for rule in self.rules:
            found.setdefault(rule.subject, []).append(rule)
        return found

    @cached_property
    def about_property(self) -> list[Claim]:
        """The rules of the asked property, in the order of the text."""
        return [rule for rule in self.rules if rule.word == self.query.word]

    def above(self, concept: str) -> int:
        """How many concepts, one after the other, lead to this one; in a circle none is counted twice."""
        seen, queue = {concept}, [concept]
        for word in queue:
            new = [rule.subject for rule in self.rules if rule.is_a and rule.word == word and rule.subject not in seen]
            seen |= {*new}
            queue += new
        return len(seen) - 1


def read_row(row: Row) -> Problem:
    """The problem of a row. ValueError where a sentence cannot be read."""
    return Problem(row)


def check_row(row: Row, *, hops: int | None = None, rival: bool = False) -> Problem:
    """ValueError unless the answer follows and the steps are its proof; returns the problem.

    hops: how many rules the proof needs, no more and no fewer; rival: some rule gives the asked property to a concept that the
    individual is not, with the other sign.
    """
    problem = read_row(row)
    query, derived = problem.query, problem.derived
    if row["answer"] not in ("True", "False"):
        raise ValueError(f"answer: {row['answer']!r} is neither 'True' nor 'False'")
    if len(set(problem.text)) < len(problem.text):
        raise ValueError(f"question: {Counter(problem.text).most_common(1)[0][0]!r} stands there twice")
    for claim in derived:
        if claim._replace(holds=not claim.holds) in derived:
            raise ValueError(f"question: it follows that {claim.subject} is {claim.word}, and that it is not")
    conclusion = query if query in derived else query._replace(holds=not query.holds)
    if conclusion not in derived:
        raise ValueError(f"question: nothing follows about {query.subject} being {query.word}")
    if row["answer"] != str(conclusion == query):
        raise ValueError(f"answer: it is {conclusion == query}, not {row['answer']}")
    if hops is not None and derived[conclusion] != hops:
        raise ValueError(f"question: the answer takes {derived[conclusion]} rules, not {hops}")
    _check_chain(problem, conclusion)
    if rival and not any(rule.holds != conclusion.holds for rule in problem.about_property):
        raise ValueError(f"question: the only rules about being {query.word} give the answer away")
    return problem


def _check_chain(problem: Problem, conclusion: Claim) -> None:
    """Fact, rule, conclusion, rule, conclusion ...: facts and rules word for word in the question, to the answer's claim."""
    chain, text = problem.chain, {*problem.text}
    now = read_claim(chain[0]) if chain else None
    if now not in problem.facts or chain[0] not in text or now.subject != problem.query.subject:
        raise ValueError(f"steps: they must begin with a fact about {problem.query.subject}")
    for i in range(1, len(chain), 2):
        rule = read_claim(chain[i])
        if not rule.of_all or chain[i] not in text:
            raise ValueError(f"steps: {chain[i]!r} is no rule of the question")
        if not (now.is_a and now.holds and rule.subject == now.word):
            raise ValueError(f"steps: {chain[i]!r} does not apply where {chain[i - 1]!r}")
        now = rule.of(now.subject)
        if i + 1 == len(chain) or read_claim(chain[i + 1]) != now:
            raise ValueError(f"steps: {chain[i]!r} is not followed by what it gives")
    if now != conclusion:
        raise ValueError(f"steps: they end with {chain[-1]!r}, which does not answer the query")
    if len(chain) // 2 != problem.derived[conclusion]:
        raise ValueError(f"steps: {len(chain) // 2} rules, where {problem.derived[conclusion]} are enough")


# ---------------------------------------------------------------- statistics


def statistics(problems: Sequence[Problem]) -> dict[str, float]:
    """Means and shares over the problems."""
    n = len(problems)

    def mean(values) -> float:
        return sum(values) / n

    found = {
        "rules": mean(len(p.rules) for p in problems),
        "rules, least": min(len(p.rules) for p in problems),
        "rules, most": max(len(p.rules) for p in problems),
        "facts": mean(len(p.facts) for p in problems),
        "words of the facts and rules": mean(sum(len(sentence.split()) for sentence in p.text) for p in problems),
        "rules of the asked property": mean(len(p.about_property) for p in problems),
        "rules with `not`": mean(sum(not rule.holds for rule in p.rules) / len(p.rules) for p in problems),
    }
    hops = Counter(len(p.chain) // 2 for p in problems)
    found |= {f"rules of the proof = {h}": count / n for h, count in sorted(hops.items())}
    cells = Counter((p.answer, "without" if p.query.holds else "with") for p in problems)
    return found | {f"answer {answer}, query {how} `not`": count / n for (answer, how), count in sorted(cells.items())}


def _sign_of(rules: Sequence[Claim], score: Callable[[Claim], float]) -> bool | None:
    """The sign of the rule with the largest score; None where rules of both signs have it."""
    best = max(map(score, rules), default=None)
    signs = {rule.holds for rule in rules if score(rule) == best}
    return signs.pop() if len(signs) == 1 else None


def _gap(problem: Problem, rule: Claim) -> int:
    """How far in the text a rule is from the nearest one about a concept that the facts name."""
    named = {fact.word for fact in problem.facts}
    place = problem.rules.index(rule)
    return min((abs(place - i) for i, other in enumerate(problem.rules) if other.subject in named), default=0)


# What each says of the property: that it holds, that it does not, or nothing (None). None of them follows a proof.
BLIND: dict[str, Callable[[Problem], bool | None]] = {
    "answer is always True": lambda p: p.query.holds,
    "query without `not` is True": lambda p: True,
    "first rule of the property": lambda p: p.about_property[0].holds if p.about_property else None,
    "last rule of the property": lambda p: p.about_property[-1].holds if p.about_property else None,
    "concept with more rules": lambda p: _sign_of(p.about_property, lambda rule: len(p.rules_of[rule.subject])),
    "more concepts above": lambda p: _sign_of(p.about_property, lambda rule: p.above(rule.subject)),
    "rule nearer to one about the individual's concepts": lambda p: _sign_of(p.about_property, lambda rule: -_gap(p, rule)),
    "commoner sign of all rules": lambda p: _sign_of(p.rules, lambda rule: sum(r.holds == rule.holds for r in p.rules)),
}


def baselines(problems: Sequence[Problem]) -> dict[str, float]:
    """Percent of the problems that each rule gets right; where it says nothing, half.

    `search k rules deep` is not blind: it follows the individual's facts so far, else guesses.
    """
    points: Counter[str] = Counter()
    for p in problems:
        right = p.query.holds == (p.answer == "True")
        for name, rule in BLIND.items():
            said = rule(p)
            points[name] += 0.5 if said is None else float(said == right)
        depth = len(p.chain) // 2
        for k in range(1, depth + 1):
            points[f"search {k} rules deep"] += 1.0 if depth <= k else 0.5
    return {name: 100 * total / len(problems) for name, total in points.items()}


def shortcuts(problems: Sequence[Problem]) -> list[str]:
    """The blind rules that are right more or less often than chance allows (five standard errors), in words."""
    allowed = 250 / math.sqrt(len(problems))
    return [
        f"{name}: right in {percent:.1f} % of {len(problems)} rows"
        for name, percent in baselines(problems).items()
        if name in BLIND and abs(percent - 50) > allowed
    ]


def first_repeat(keys: Sequence) -> tuple[int, int] | None:
    """The first two equal keys, None where all differ."""
    first: dict = {}
    for i, key in enumerate(keys):
        if (before := first.setdefault(key, i)) != i:
            return before, i
    return None
