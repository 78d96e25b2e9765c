"""Health checks of what a checkpoint says: whether its greedy text has collapsed, and whether it copies its input.

    variety(patient)      16 prompts of its own data, 32 tokens each: shares, runs, distinct tokens, echo of the prompt's end
    questions(patient)    three prompts ending in "A:", printed; only collapse is judged, whether they are right is reported
    echo(patient)         how often the most likely next token is the token itself, teacher-forced

What is natural depends on the data: answers of ProsQA share their first token, characters repeat. So each limit is moved to
what the data's own continuations reach, and a quarter of that further, where they would not meet it themselves. The limits
themselves are for text of a large vocabulary. Nothing is asked of an untrained model, which echoes where head and
embedding are tied; its values are shown.
"""

import re
from collections import Counter
from itertools import groupby

import numpy as np
import torch

from analysis.health_patient import MOST_NEW_TOKENS, Patient, Result, labelled, not_applicable
from dataset import extract_answer

PROMPTS = 16
FEWEST_PROMPTS = 8
LONGEST_RUN = 6  # of one token; so many are too many
SLACK = 1.25
MOST_ECHO = 0.3
QUESTIONS = (
    ("Q: Tom has 15 apples and sells 7 of them. How many apples are left?\nA:", "8"),
    ("Q: What is 25 + 17?\nA:", "42"),
    ("Paris is the capital of France. Q: What is the capital of France?\nA:", "Paris"),
)


def statistics(outputs: list[list[int]], ends: list[int]) -> dict[str, float]:
    """Of continuations and the last token of each one's prompt: what `variety` judges."""
    tokens = [t for output in outputs for t in output]
    firsts = [output[0] for output in outputs if output]
    return {
        "top_share": Counter(tokens).most_common(1)[0][1] / len(tokens) if tokens else 1.0,
        "distinct_first": len({*firsts}),
        "longest_run": max(map(longest_run, outputs)),
        "distinct_1": len({*tokens}) / len(tokens) if tokens else 0.0,
        "echo": sum(bool(output) and output[0] == end for output, end in zip(outputs, ends)) / len(outputs),
    }


def longest_run(tokens: list[int]) -> int:
    """How often one token stands in a row."""
    return max((len(list(same)) for _, same in groupby(tokens)), default=0)


def limits(gold: dict[str, float]) -> dict[str, tuple[str, float]]:
    """{statistic: ("<" or ">=" or ">", limit)}, moved to what the data themselves reach; see the module's docstring."""
    return {
        "top_share": ("<", 0.4 if gold["top_share"] < 0.4 else SLACK * gold["top_share"]),
        "distinct_first": (">=", min(3, gold["distinct_first"])),
        "longest_run": ("<", LONGEST_RUN if gold["longest_run"] < LONGEST_RUN else gold["longest_run"] + 1),
        "distinct_1": (">", 0.2 if gold["distinct_1"] > 0.2 else gold["distinct_1"] / SLACK),
        "echo": ("<", 0.5 if gold["echo"] < 0.5 else 1.01),
    }


def _meets(value: float, sign: str, limit: float) -> bool:
    return value < limit if sign == "<" else value > limit if sign == ">" else value >= limit


@torch.no_grad()
def variety(patient: Patient) -> list[Result]:
    """One result for each statistic."""
    prompts = patient.prompts[:PROMPTS]
    names = [f"variety.{name}" for name in ("top_share", "distinct_first", "longest_run", "distinct_1", "echo")]
    few = f"{len(prompts)} prompts; {FEWEST_PROMPTS} are needed" if len(prompts) < FEWEST_PROMPTS else None
    if patient.single_pass_only or few:
        return [not_applicable(name, patient.single_pass_only or few) for name in names]
    outputs, ends = patient.generated(prompts), [int(prompt["input_ids"][-1]) for prompt in prompts]
    own, gold = statistics(outputs, ends), statistics([row[:MOST_NEW_TOKENS] for row in patient.gold[: len(prompts)]], ends)
    patient.shared["outputs"] = [
        {"prompt": decoded(patient, prompt["input_ids"]), "output": decoded(patient, output)}
        for prompt, output in list(zip(prompts, outputs))[:3]
    ]
    results = []
    for name, (sign, limit) in limits(gold).items():
        value, rule = own[name], f"{sign} {limit:.3g}"
        detail = f"{sum(map(len, outputs))} tokens after {len(prompts)} prompts; the data's own: {gold[name]:.3g}"
        if why := patient.why_not_judged:
            results.append(not_applicable(f"variety.{name}", why, value, rule, gold=gold[name]))
        else:
            results.append(Result(f"variety.{name}", value, rule, _meets(value, sign, limit), detail, {"gold": gold[name]}))
    return results


def decoded(patient: Patient, tokens) -> str:
    return patient.subject.tokenizer.decode(tokens, skip_special_tokens=True)


# ---------------------------------------------------------------- three questions


@torch.no_grad()
def questions(patient: Patient) -> list[Result]:
    """How many of three outputs are one token over and over, or the prompt's last token first and most of all."""
    name, rule, ids = "questions", "0 of 3 collapsed", patient.subject.ids
    if patient.single_pass_only:
        return [not_applicable(name, patient.single_pass_only)]
    middle = [ids.start, *[ids.latent] * patient.subject.n_thoughts, ids.end] if patient.subject.config.markers else []
    prompts = []
    for text, _ in QUESTIONS:
        tokens = encoded(patient.subject.tokenizer, text)
        if tokens is None:
            return [not_applicable(name, "the tokenizer lacks characters of these prompts", None, rule)]
        prompts.append({"input_ids": np.array([*tokens, *middle], dtype=np.int64), "idx": len(prompts)})
    outputs = patient.generated(prompts)
    asked = []
    for (text, answer), prompt, output in zip(QUESTIONS, prompts, outputs):
        said = decoded(patient, output)
        found = {"right": answers(said, answer), "collapsed": collapsed(output, prompt, len(middle))}
        asked.append({"prompt": text, "output": said} | found)
    n, right = sum(a["collapsed"] for a in asked), sum(a["right"] for a in asked)
    detail = f"{right} of 3 right"
    patient.shared["questions"] = asked
    if why := patient.why_untrained:
        return [not_applicable(name, f"{why} ({detail})", n, rule, questions=asked)]
    return [Result(name, n, rule, n == 0, detail, {"questions": asked})]


def answers(said: str, answer: str) -> bool:
    """Whether a text comes to an answer: behind its last `#`, else as its last number, or for a word anywhere."""
    marked = extract_answer(said)
    if marked is not None:
        return marked.rstrip(".") == answer
    words = re.findall(r"\d+(?:\.\d+)?" if answer.isdigit() else r"\w+", said)
    return answer in (words[-1:] if answer.isdigit() else words)


def collapsed(output: list[int], prompt: dict, n_behind: int) -> bool:
    """Whether a continuation is one token over and over, or little but the last token of the prompt's text."""
    end = int(prompt["input_ids"][-1 - n_behind])
    return longest_run(output) >= LONGEST_RUN or (len(output) > 1 and 2 * output.count(end) > len(output))


def encoded(tokenizer, text: str) -> list[int] | None:
    """The tokens of a text; None where they do not give it back, but for white space."""
    try:
        tokens = tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # what a tokenizer without a token for unknown characters raises
        return None
    return tokens if "".join(tokenizer.decode(tokens).split()) == "".join(text.split()) else None


# ---------------------------------------------------------------- copying


@torch.no_grad()
def echo(patient: Patient) -> list[Result]:
    """The share of columns before labelled tokens whose most likely next token is their own."""
    copies, repeats, total = 0, 0, 0
    for batch in patient.batches(patient.rows):
        asked, ids = labelled(batch), batch["input_ids"]
        said_N = patient.paths["wrapper"](batch)[asked].argmax(-1)
        copies += (said_N == ids[asked]).sum().item()
        repeats += (ids.roll(-1, 1)[asked] == ids[asked]).sum().item()
        total += len(said_N)
    value, gold = copies / total, repeats / total
    limit = MOST_ECHO if gold < MOST_ECHO else SLACK * gold
    rule, detail = f"<= {limit:.3g}", f"of {total} labelled tokens; the data's own: {gold:.1%}"
    if why := patient.why_not_judged:
        return [not_applicable("echo", f"{why} ({detail})", value, rule)]
    return [Result("echo", value, rule, value <= limit, detail, {"gold": gold})]
