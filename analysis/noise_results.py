"""The files of a noise experiment: what a question said at each scale, counts with intervals, checkpoints, and a reader.

    final_results.json      experiment_info, accuracy_by_noise, questions, baselines, fits, breakdown, paired_with_clean
    checkpoint_<n>.json     the first three, of the n questions that are finished
    baselines.json          what the baselines said, once for all types of noise

    result = read_results("results/noisy_coconut/final_results.json")       # also files of mmjerge/noisycoconut
    result["units"]                                                        # "fraction" or "percent": what the file held

Failures are no answers: they stand in `errors`, outside `total`; empty text is a wrong answer. Above 5 % failures at any scale
no accuracy is claimed.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from analysis.noise_answers import Said
from analysis.noise_asker import Asker, Question
from analysis.noise_fits import breakdown, fits, in_order, label, strength
from analysis.stats import holm, mcnemar, wilson
from files import read_json, write_json

SCHEMA_VERSION = 1
MOST_ERRORS = 0.05
CLEAN = "0"
NUMBERED = re.compile(r"checkpoint_(\d+)\.json")
PASSING = ("timestamp", "versions", "device")  # what may differ between a stopped run and its continuation


def key_of(scale: float) -> str:
    """A scale as a key of accuracy_by_noise: 0, 0.5, 10."""
    return f"{scale:g}"


# ---------------------------------------------------------------- one answer


def test_record(asker: Asker, question: Question, said: Said) -> dict:
    """An entry of `noise_tests`. `generated_tokens` counts new tokens, without thoughts and EOS; norms are means over slots."""
    text = answer = None
    if said.new_ids is not None:
        text = asker.tokenizer.decode(said.new_ids, skip_special_tokens=True)
        answer = asker.read(text, question)
    norms = list(said.norms.values())
    return {
        "noise_scale": said.scale,
        "generated_text": text,
        "generated_answer": answer,
        "is_correct": said.new_ids is not None and asker.right(answer, question),
        "success": said.new_ids is not None,
        "error": said.error,
        "generated_tokens": None if said.new_ids is None else len(said.new_ids),
        "thought_norm": sum(norm for norm, _ in norms) / len(norms) if norms else None,
        "noise_norm": sum(size for _, size in norms) / len(norms) if norms else None,
    }


def question_record(question: Question, tests: Sequence[dict]) -> dict:
    """An entry of `questions`."""
    about = {"question_id": question.id, "question": question.text, "expected_answer": question.answer}
    return about | {"noise_tests": list(tests)}


# ---------------------------------------------------------------- counts


def counted(tests: Sequence[dict]) -> dict:
    """An entry of `accuracy_by_noise`: counts, accuracy with Wilson's 95 % interval (fractions), mean new tokens and norms."""
    fine = [test for test in tests if test["success"]]
    correct, total, errors = sum(test["is_correct"] for test in fine), len(fine), len(tests) - len(fine)
    level = {"correct": correct, "total": total, "errors": errors, "accuracy": None, "accuracy_percent": None, "ci95": None}
    if too_many_errors(level):
        level |= {"label": None, "reason": f"{errors} of {len(tests)} answers failed: no accuracy is claimed"}
    elif total:
        found = wilson(correct, total)
        accuracy = found["accuracy"]
        level |= {"accuracy": accuracy, "accuracy_percent": 100 * accuracy, "ci95": found["ci95"], "label": label(accuracy)}
    means = {"gen_tokens": "generated_tokens", "thought_norm": "thought_norm", "noise_norm": "noise_norm"}
    return level | {name: _mean([test[key] for test in fine]) for name, key in means.items()}


def too_many_errors(level: dict) -> bool:
    """Whether so many answers failed that the rest says nothing."""
    return level["errors"] > MOST_ERRORS * (level["errors"] + level["total"])


def _mean(values: Sequence[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def paired(clean: Sequence[dict], other: Sequence[dict]) -> dict | None:
    """McNemar's test of clean against other answers to the same questions, of those where neither failed."""
    both = [(a["is_correct"], b["is_correct"]) for a, b in zip(clean, other, strict=True) if a["success"] and b["success"]]
    return mcnemar(*map(list, zip(*both))) if both else None


def result_of(info: dict, questions: Sequence[dict], baselines: dict[str, list[dict]], absolute: float | None = None) -> dict:
    """All of final_results.json. `baselines`: name -> tests, one a question; `absolute`: see `fits.breakdown`."""
    scales = in_order(info["noise_type"], info["noise_scales"])
    by_scale = {s: [_at(question, s) for question in questions] for s in scales}
    levels = {key_of(s): counted(tests) for s, tests in by_scale.items()}
    summary = {name: counted(tests) for name, tests in baselines.items()}
    clean = baselines["clean"]
    claimed = not any(map(too_many_errors, [*levels.values(), *summary.values()]))
    tests = {key_of(s): paired(clean, by_scale[s]) for s in scales if s != 0}
    adjusted = holm({name: test["p_value"] for name, test in tests.items() if test})
    result = {
        "experiment_info": info,
        "accuracy_by_noise": levels,
        "baselines": {name: level | _beside(clean, baselines[name], name) for name, level in summary.items()},
        "paired_with_clean": {name: test and test | {"p_holm": adjusted[name]} for name, test in tests.items()},
        "accuracy_claimed": claimed,
        "fits": None,
        "breakdown": None,
        "questions": list(questions),
    }
    if claimed:
        at, accuracy = [strength(info["noise_type"], s) for s in scales], [level["accuracy"] for level in levels.values()]
        base = summary["clean"]["accuracy"]
        line = base / 2 if absolute is None else absolute
        rule = "below half the clean accuracy" if absolute is None else f"below {absolute:g}"
        result["fits"] = fits(at, accuracy)
        result["breakdown"] = {"scale": breakdown(scales, accuracy, base, absolute), "line": line, "rule": rule}
    return result


def _at(question: dict, scale: float) -> dict:
    return next(test for test in question["noise_tests"] if test["noise_scale"] == scale)


def _beside(clean: Sequence[dict], tests: Sequence[dict], name: str) -> dict:
    return {} if name == "clean" else {"paired_with_clean": paired(clean, tests)}


# ---------------------------------------------------------------- files


def identity(info: dict) -> dict:
    """What must agree for a run to go on with a file, as JSON gives it back."""
    return json.loads(json.dumps({key: value for key, value in info.items() if key not in PASSING}))


def same_run(path: Path, found: dict, info: dict) -> None:
    """Raise ValueError where a file holds an experiment with other settings."""
    before, now = identity(found), identity(info)
    other = [key for key in now if before.get(key) != now[key]]
    if other:
        was = ", ".join(f"{key} {before.get(key)!r:.60} (now {now[key]!r:.60})" for key in other[:3])
        raise ValueError(f"{path} holds an experiment with other settings: {was}; give another --output-dir")


def unfinished(folder: Path, info: dict) -> dict[str, dict]:
    """The finished questions in the newest checkpoint_<n>.json of a folder, by id."""
    numbers = sorted(int(found[1]) for path in folder.glob("checkpoint_*.json") if (found := NUMBERED.fullmatch(path.name)))
    if not numbers:
        return {}
    path = folder / f"checkpoint_{numbers[-1]}.json"
    held = read_json(path, "experiment_info", "questions")
    same_run(path, held["experiment_info"], info)
    return {question["question_id"]: question for question in held["questions"]}


def save_checkpoint(folder: Path, info: dict, questions: Sequence[dict]) -> Path:
    """Write checkpoint_<n>.json of n finished questions."""
    scales = in_order(info["noise_type"], info["noise_scales"])
    levels = {key_of(s): counted([_at(question, s) for question in questions]) for s in scales}
    path = folder / f"checkpoint_{len(questions)}.json"
    write_json(path, {"experiment_info": info, "accuracy_by_noise": levels, "questions": list(questions)})
    return path


def not_a_run_folder(folder: Path) -> None:
    """Raise ValueError where a folder, or one above it, is the folder of a training run."""
    for place in (folder.resolve(), *folder.resolve().parents):
        if (place / "run.json").is_file() or any(place.glob("state_[0-9]*")):
            raise ValueError(f"--output-dir {folder} lies in the run folder {place}; name a folder outside of it")


# ---------------------------------------------------------------- the reader


def read_results(path: str | Path) -> dict:
    """A result with accuracies as fractions, and `units`: "fraction" or "percent", what the file held.

    Files of mmjerge/noisycoconut hold either. Which one follows from the counts where a file has them, else from values
    above 1. Raises ValueError where no accuracy is found, or the entries of one file disagree.
    """
    result = read_json(path, "accuracy_by_noise")
    if "schema_version" in result.get("experiment_info", {}):
        return result | {"units": "fraction"}
    found = set()
    for level in result["accuracy_by_noise"].values():
        accuracy = level.get("accuracy")
        if accuracy is None or accuracy == 0:
            continue
        share = level["correct"] / level["total"] if level.get("total") else None
        if share is not None and min(abs(accuracy - share), abs(accuracy / 100 - share)) > 0.01:
            raise ValueError(
                f"{path}: accuracy {accuracy} is neither fraction nor percent of {level['correct']}/{level['total']}"
            )
        is_percent = accuracy > 1 if share is None else abs(accuracy / 100 - share) < abs(accuracy - share)
        found.add("percent" if is_percent else "fraction")
    if len(found) != 1:
        what = "no accuracy above 0" if not found else "fractions beside percent"
        raise ValueError(f"{path} holds {what}: the unit of its accuracies cannot be told")
    units = found.pop()
    if units == "percent":
        levels = {
            scale: level | ({"accuracy": level["accuracy"] / 100} if level.get("accuracy") is not None else {})
            for scale, level in result["accuracy_by_noise"].items()
        }
        result |= {"accuracy_by_noise": levels}
    return result | {"units": units}
