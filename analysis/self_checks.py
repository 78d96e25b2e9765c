"""Checks that every experiment passes on a checkpoint before it measures anything: a failure stops it, with the reason.

identity          an edit that changes nothing changes nothing, to the bit
self_replay       a row's own thoughts put back in place change nothing
recorded          the accuracy that training recorded with the checkpoint comes out again
processed         the embeddings as fed, thoughts filled, give the rollout's logits in one plain pass
one_function      a pause mode run as a loop over its slots gives what it gives in one pass
positive_control  with all facts replaced by noise, the answer is a coin's
"""

import math

import numpy as np
import torch

from analysis.command import CheckFailed
from analysis.interventions import Patch, gaussian, identity
from analysis.positions import Places
from analysis.subject import Problems, Prompts, Subject, positions
from coconut import Coconut
from dataset import get_question_latent_dataset
from evaluate import evaluate
from world import World

ROWS = 100  # problems that the checks look at
TOLERANCE = 1e-3  # nats; one batch in another shape differs by rounding


def self_checks(subject: Subject, problems: Problems, seed: int = 0) -> dict[str, dict]:
    """All checks on the first rows of `problems`: {name: {"passed", ...what was seen}}.

    A check that does not apply says why under "skipped". Raises CheckFailed with all failures in one line.
    """
    numbers = range(min(ROWS, len(problems)))
    prompts = subject.prompts(problems, numbers)
    clean = subject.answers(prompts)
    found = {
        "identity": _identity(subject, prompts, clean),
        "self_replay": _self_replay(subject, prompts, clean),
        "recorded": _recorded(subject),
        "processed": _processed(subject, prompts),
        "one_function": _one_function(subject, prompts),
        "positive_control": _positive_control(subject, prompts, clean, seed),
    }
    failed = {name: check for name, check in found.items() if not check["passed"]}
    if failed:
        details = "; ".join(f"{name}: {check}" for name, check in failed.items())
        raise CheckFailed(f"{subject.path}: {details}")
    return found


def _skip(reason: str) -> dict:
    return {"passed": True, "skipped": reason}


def difference(clean: list[dict], other: list[dict]) -> dict:
    """How far two lists of records are apart: answers that differ, and the largest change of a margin in nats."""
    pairs = [(a["margin"], b["margin"]) for a, b in zip(clean, other) if a.get("margin") is not None]
    return {
        "n": len(clean),
        "answers_changed": sum(a["output"] != b["output"] for a, b in zip(clean, other)),
        "largest_margin_change": max((abs(a - b) for a, b in pairs), default=0.0),
    }


def _identity(subject: Subject, prompts: Prompts, clean: list[dict]) -> dict:
    everywhere = type("Everywhere", (), {"layers": range(subject.n_layers + 1), "__call__": staticmethod(identity)})()
    seen = difference(clean, subject.answers(prompts, everywhere))
    return {"passed": not seen["answers_changed"] and seen["largest_margin_change"] == 0.0, **seen}


def _self_replay(subject: Subject, prompts: Prompts, clean: list[dict]) -> dict:
    if not subject.n_thoughts:
        return _skip("no thoughts")
    edit = Patch(0, prompts.slots, subject.thoughts(prompts))
    seen = difference(clean, subject.answers(prompts, edit))
    replaced = edit.n_hit == prompts.slots.numel()
    passed = replaced and not seen["answers_changed"] and seen["largest_margin_change"] <= TOLERANCE
    return {"passed": passed, "slots_replaced": edit.n_hit, **seen}


def _recorded(subject: Subject) -> dict:
    record, path = subject.recorded, subject.config.val_path
    if record is None:
        return _skip("no validation of this checkpoint in metrics.jsonl")
    try:
        problems = Problems.read(path, subject.tokenizer, subject.config.max_val_samples)
    except ValueError as error:
        return _skip(f"validation file: {error}")
    if len(problems) != record["total"]:
        return _skip(f"{path} has {len(problems)} rows, {record['total']} were validated")
    bare = not subject.config.markers
    ids = subject.ids.start, subject.ids.latent, subject.ids.end
    prompts = get_question_latent_dataset(record["stage"], problems.table, subject.config, *ids, bare)
    sizes = subject.batch_size, subject.config.max_new_tokens or 128
    world = World(0, 1, subject.device)
    records, _ = evaluate(subject.model, prompts, problems.rows, subject.tokenizer, *sizes, world, quiet=True)
    correct = sum(r["correct"] for r in records)
    allowed = 0 if subject.device.type == "cpu" and not subject.config.bf16 else math.ceil(0.01 * len(records))
    passed = abs(correct - record["correct"]) <= allowed
    return {"passed": passed, "correct": correct, "recorded": record["correct"], "n": len(records), "allowed": allowed}


def _processed(subject: Subject, prompts: Prompts) -> dict:
    """Feed [1, T, D] embeddings of single rows once, through a wrapper that fills nothing."""
    plain = Coconut(subject.model.base_causallm, None, None, None, subject.model.eos_token_id, "none").eval()
    largest = 0.0
    for i in range(min(8, len(prompts))):
        ids = torch.from_numpy(prompts.tokens[i])[None].to(subject.device)
        with torch.no_grad():
            out = subject.model(ids)
            again = plain(ids, edit=lambda layer, pass_, x, fed=out.inputs_embeds: fed)
        largest = max(largest, float((out.logits - again.logits).abs().max()))
    return {"passed": largest <= 1e-4 * max(1.0, float(out.logits.abs().max())), "largest_logit_change": largest}


def _one_function(subject: Subject, prompts: Prompts) -> dict:
    model = subject.model
    if not subject.n_thoughts or model.feedback_mode not in ("frozen", "learned_shared", "pause_curriculum"):
        return _skip("no pause mode")
    few, was = prompts.take(range(min(32, len(prompts)))), model.force_multipass
    seen = []
    try:
        for model.force_multipass in (False, True):
            seen.append(subject.scores(few))
    finally:
        model.force_multipass = was
    change = max(abs(a["margin"] - b["margin"]) for a, b in zip(*seen))
    return {"passed": change <= TOLERANCE, "largest_margin_change": change, "n": len(few)}


def _positive_control(subject: Subject, prompts: Prompts, clean: list[dict], seed: int) -> dict:
    """Noise of the token embeddings' scale in place of all facts: two-choice accuracy within 3 standard errors of 50."""
    if clean[0].get("margin") is None:
        return _skip("rows name no two options")
    facts = positions([Places.of(row, subject.tokenizer).all_facts for row in prompts.rows])
    scale = float(subject.model.embedding.weight.float().std())
    noise = scale * gaussian(seed, prompts.numbers, facts.shape[1], subject.width)
    edit = Patch(0, facts, noise)
    records = subject.answers(prompts, edit)
    n, error = len(records), 3 * 0.5 / math.sqrt(len(records))
    before, after = (float(np.mean([r["two_choice_correct"] for r in some])) for some in (clean, records))
    says = before > 0.5 + error
    return {
        "passed": abs(after - 0.5) <= error,
        "clean_two_choice": before,
        "two_choice": after,
        "within": error,
        "n": n,
        **({} if says else {"note": "clean accuracy is a coin's as well, so this control says nothing"}),
    }
