"""Rows that a barely trained checkpoint answers right, as their answer is what it says anyway; a broken instrument."""

import json
from dataclasses import replace
from pathlib import Path

from evaluate_material import draw

from analysis.subject import Problems, Subject
from analysis.tracing import Chunk


def rows_it_gets_right(run: Path, folder: Path, n: int) -> Path:
    """A data file of n drawn rows; where the checkpoint gives any answer, it is made the gold one. Its path."""
    path = folder / "prosqa_test.json"
    path.write_text(json.dumps(draw(n)))
    subject = Subject.load(run, device="cpu")
    problems = Problems.read(path, subject.tokenizer)
    said = [record["prediction"] for record in subject.answers(subject.prompts(problems))]
    rows = [row | {"answer": answer} if answer else row for row, answer in zip(problems.rows, said)]
    path.write_text(json.dumps(rows))
    return path


def states_of_another_run(chunk: Chunk, layer, row_I, which_IK, restore=Chunk.restore):
    """In place of `Chunk.restore`: puts back what was not recorded there."""
    return restore(replace(chunk, states={layer: chunk.states[layer].flip(-1)}), layer, row_I, which_IK)
