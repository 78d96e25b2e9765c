"""The files of an experiment with branches: what each question's branches said, counts by cell, paired tests.

    final_results.json      experiment_info, accuracy_by_noise, grid, paired, baselines, accuracy_claimed, questions
    checkpoint_<n>.json     experiment_info and the n questions that are finished

`accuracy_by_noise` is the majority vote at the temperature above 0; `grid` has an entry for every cell, with all aggregators,
the abstention curve and path diversity. A question is an error where all its branches failed; a branch that failed counts
for agreement and doesn't vote. Above 5 % failed questions or branches in any cell no accuracy is claimed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from analysis.branching_rollout import Branch, Cell
from analysis.branching_votes import AGGREGATORS, abstention, agreement, canonical, distribution, diversity
from analysis.noise_asker import Asker, Question
from analysis.noise_results import MOST_ERRORS, counted, key_of, paired, too_many_errors
from analysis.stats import holm
from files import write_json

DIVERSITY_MEANS = ("d_k", "d_k_late", "d_k_normalized")

# ---------------------------------------------------------------- one question


def cell_record(asker: Asker, question: Question, cell: Cell, branches: Sequence[Branch]) -> dict:
    """An entry of `noise_tests`: what the branches said in a cell, and what they say together.

    `generated_text` is that of the first branch with the majority's answer; `generated_tokens` are new tokens a branch
    (mean over those that did not fail), `generated_tokens_all` those of all branches together.
    """
    spoke = [k for k, branch in enumerate(branches) if branch.error is None]
    texts = [None if b.error else asker.tokenizer.decode(b.new_ids, skip_special_tokens=True) for b in branches]
    answers = [None if text is None else asker.read(text, question) for text in texts]
    answers = [canonical(answer, asker.numbers) for answer in answers]
    logprobs = [branch.logprob for branch in branches]
    chosen = {name: choose(answers, logprobs) for name, choose in AGGREGATORS.items()}
    right = {name: bool(spoke) and asker.right(answer, question) for name, answer in chosen.items()}
    paths = [branches[k].fed_SD for k in spoke]
    n_tokens = [len(branches[k].new_ids) for k in spoke]
    winner = next((k for k in spoke if answers[k] == chosen["majority"]), None)
    return {
        "noise_scale": cell.scale,
        "temperature": cell.temperature,
        "generated_text": None if winner is None else texts[winner],
        "generated_answer": chosen["majority"],
        "is_correct": right["majority"],
        "success": bool(spoke),
        "error": None if spoke else branches[0].error,
        "generated_tokens": sum(n_tokens) / len(spoke) if spoke else None,
        "generated_tokens_all": sum(n_tokens),
        "thought_norm": None,
        "noise_norm": None,
        "branch_texts": texts,
        "branch_answers": answers,
        "branch_logprobs": logprobs,
        "branch_errors": [branch.error for branch in branches],
        "majority_answer": chosen["majority"],
        "vote_distribution": distribution(answers),
        "num_branches": len(branches),
        "agreement": agreement(answers),
        "aggregators": {name: {"answer": chosen[name], "is_correct": right[name]} for name in AGGREGATORS},
        **diversity(torch.stack(paths) if paths else torch.zeros(0, 0, 1), spoke),
    }


def tests_of(questions: Sequence[dict], cell: Cell) -> list[dict]:
    """The entries of a cell, one a question."""
    here = (cell.scale, cell.temperature)
    return [next(t for t in q["noise_tests"] if (t["noise_scale"], t["temperature"]) == here) for q in questions]


# ---------------------------------------------------------------- one cell


def cell_summary(tests: Sequence[dict], cell: Cell) -> dict:
    """An entry of `grid`: the vote's accuracy as `counted` has it, each aggregator's, abstention, agreement, diversity."""
    level, fine = counted(tests), [test for test in tests if test["success"]]
    n_branches = tests[0]["num_branches"]
    failed = sum(error is not None for test in tests for error in test["branch_errors"])
    level |= {"branches": n_branches * len(tests), "branch_errors": failed}
    summary = {"noise_scale": cell.scale, "temperature": cell.temperature, "num_branches": n_branches} | level
    summary["gen_tokens_all_branches"] = _mean([test["generated_tokens_all"] for test in fine])
    summary["agreement"] = _mean([test["agreement"] for test in fine])
    summary["distinct_answers"] = _mean([len(test["vote_distribution"]) for test in fine])
    summary |= {name: _mean([test[name] for test in fine]) for name in DIVERSITY_MEANS}
    claims = not failing(level)
    if not claims:
        summary |= {"accuracy": None, "accuracy_percent": None, "ci95": None, "label": None}
    votes = [(round(test["agreement"] * n_branches), test["is_correct"]) for test in fine]
    summary["abstention"] = abstention(votes, n_branches) if claims else None
    summary["aggregators"] = {
        name: counted([test | test["aggregators"][name] for test in tests]) if claims else None for name in AGGREGATORS
    }
    return summary


def failing(level: dict) -> bool:
    """Whether so many questions or branches failed that the rest says nothing."""
    return too_many_errors(level) or level["branch_errors"] > MOST_ERRORS * level["branches"]


def _mean(values: Sequence[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------- paired tests


def paired_tests(questions: Sequence[dict], cells: Sequence[Cell], greedy: Sequence[dict]) -> list[dict]:
    """McNemar's tests of majority votes on the same questions, with p adjusted by Holm over all of them.

    Each cell with noise against none at its temperature ("noise"); each at a temperature above 0 against 0 ("temperature");
    each against one greedy answer without noise ("branches"; `greedy`: a test for each question).
    """
    pairs = [("noise", Cell(0.0, cell.temperature), cell) for cell in cells if cell.scale]
    pairs += [("temperature", Cell(cell.scale, 0.0), cell) for cell in cells if cell.temperature]
    pairs += [("branches", None, cell) for cell in cells]
    found = []
    for what, first, second in pairs:
        test = paired(greedy if first is None else tests_of(questions, first), tests_of(questions, second))
        named = {side: cell and vars(cell) for side, cell in (("first", first), ("second", second))}
        found.append({"what": what, **named, **(test or {"n": 0, "p_value": None})})
    adjusted = holm({str(i): test["p_value"] for i, test in enumerate(found)})
    return [test | {"p_holm": adjusted[str(i)]} for i, test in enumerate(found)]


# ---------------------------------------------------------------- the whole


def result_of(info: dict, questions: Sequence[dict], cells: Sequence[Cell], baselines: dict[str, list[dict]]) -> dict:
    """All of final_results.json. `baselines`: name -> tests of single greedy answers, one a question, with `clean`."""
    grid = [cell_summary(tests_of(questions, cell), cell) for cell in cells]
    summary = {name: counted(tests) for name, tests in baselines.items()}
    claimed = not any(map(failing, grid)) and not any(map(too_many_errors, summary.values()))
    return {
        "experiment_info": info,
        "accuracy_by_noise": by_noise(grid, info["temperature"]),
        "grid": grid,
        "paired": paired_tests(questions, cells, baselines["clean"]) if claimed else None,
        "baselines": summary,
        "accuracy_claimed": claimed,
        "questions": list(questions),
    }


def by_noise(grid: Sequence[dict], temperature: float) -> dict[str, dict]:
    """The counts of the cells at one temperature, by scale."""
    keys = ("correct", "total", "errors", "accuracy", "accuracy_percent", "ci95", "gen_tokens")
    return {key_of(c["noise_scale"]): {key: c[key] for key in keys} for c in grid if c["temperature"] == temperature}


def save_checkpoint(folder: Path, info: dict, questions: Sequence[dict], cells: Sequence[Cell]) -> Path:
    """Write checkpoint_<n>.json of n finished questions."""
    path = folder / f"checkpoint_{len(questions)}.json"
    grid = [cell_summary(tests_of(questions, cell), cell) for cell in cells] if questions else []
    levels = by_noise(grid, info["temperature"])
    write_json(path, {"experiment_info": info, "accuracy_by_noise": levels, "questions": list(questions)})
    return path
