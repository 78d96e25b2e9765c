"""A checkpoint under study: it knows itself, answers in batches as alone, and its states are the model's own."""

import json

import numpy as np
import pytest
import torch

from analysis.interventions import NOWHERE, Patch
from analysis.positions import Places
from analysis.subject import Problems, Subject, best_epoch, find_epoch, positions
from backbones import load_tokenizer

KEYS = ("m0", "m1", "m3", "m4", "m4b", "m5")
THOUGHTS = {"m0": 0, "m1": 0, "m3": 2, "m4": 2, "m4b": 2, "m5": 2}


@pytest.fixture(scope="module")
def problems_of(small_data):
    return lambda subject, n=11: Problems.read(small_data / "prosqa_valid.json", subject.tokenizer, n)


@pytest.mark.parametrize("key", KEYS)
def test_a_checkpoint_knows_what_it_is(tiny_runs, key):
    subject = Subject.load(tiny_runs[key])
    assert (subject.label, subject.key, subject.repeat, subject.epoch) == (key, key, 0, 3)
    assert subject.n_thoughts == THOUGHTS[key] and subject.n_layers == 3 and subject.width == 128
    assert subject.recycles == (key == "m3") and subject.recorded["total"] == 11
    assert not any(p.requires_grad for p in subject.model.parameters()) and not subject.model.training


@pytest.mark.parametrize("key", KEYS)
def test_clean_answers_are_those_of_training(tiny_runs, problems_of, key):
    """At the last stage, prompts with all thoughts are those that validation saw: the same records."""
    subject = Subject.load(tiny_runs[key])
    prompts = subject.prompts(problems_of(subject))
    assert all((ids == subject.ids.latent).sum() == THOUGHTS[key] for ids in prompts.tokens)
    stored = [json.loads(line) for line in (tiny_runs[key] / "eval_3.jsonl").read_text().splitlines()]
    for mine, theirs in zip(subject.answers(prompts), stored, strict=True):
        assert mine["output"] == theirs["output"] and mine["margin"] == pytest.approx(theirs["margin"], abs=1e-4)


@pytest.mark.parametrize("key", ["m1", "m3", "m5"])
def test_batch_size_and_repetition_change_nothing(tiny_runs, problems_of, key):
    records = []
    for size in (3, 50):
        subject = Subject.load(tiny_runs[key], batch_size=size)
        prompts = subject.prompts(problems_of(subject)).times(2)
        records.append(subject.answers(prompts))
        assert prompts.numbers == [i for i in range(11) for _ in range(2)]
    for a, b, twin in zip(records[0], records[1], [records[1][i ^ 1] for i in range(22)]):
        assert a["output"] == b["output"] == twin["output"]
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4) and b["margin"] == pytest.approx(twin["margin"], abs=1e-4)


@pytest.mark.parametrize("key", ["m3", "m5", "m1"])
def test_states_are_the_hidden_states_of_one_row(tiny_runs, problems_of, key):
    """Against the library's own hidden states over the filled embeddings, at question tokens and slots."""
    subject = Subject.load(tiny_runs[key], batch_size=4)
    prompts = subject.prompts(problems_of(subject))
    where = positions([[0, 3, len(ids) - 2, len(ids) - 1] for ids in prompts.tokens])
    states = subject.states(prompts, where)
    assert states.shape == (11, 4, 4, 128)
    for i, ids in enumerate(prompts.tokens):
        fed = subject.model(torch.from_numpy(ids)[None]).inputs_embeds
        theirs = subject.model.base_causallm(inputs_embeds=fed, output_hidden_states=True).hidden_states
        for layer in range(4):
            assert torch.allclose(states[i, layer], theirs[layer][0, where[i]], atol=1e-4)
    assert torch.equal(subject.states(prompts, where, layers=(3, 1)), states[:, [3, 1]])


def test_thoughts_are_what_was_fed(tiny_runs, problems_of):
    for key, same_everywhere in [("m3", False), ("m4", True)]:
        subject = Subject.load(tiny_runs[key], batch_size=4)
        prompts = subject.prompts(problems_of(subject))
        thoughts = subject.thoughts(prompts)
        for i, ids in enumerate(prompts.tokens):
            fed = subject.model(torch.from_numpy(ids)[None]).inputs_embeds[0]
            assert torch.allclose(thoughts[i], fed[prompts.slots[i]], atol=1e-5)
        assert bool((thoughts == thoughts[:1, :1]).all()) == same_everywhere


def test_states_under_an_edit_show_the_edit(tiny_runs, problems_of):
    subject = Subject.load(tiny_runs["m3"])
    prompts = subject.prompts(problems_of(subject))
    where = positions([[2]] * len(prompts))
    clean = subject.states(prompts, where)
    edit = Patch(1, where, torch.zeros(len(prompts), 1, 128))
    edited = subject.states(prompts, where, edit=edit)
    assert torch.equal(edited[:, 0], clean[:, 0]) and not edited[:, 1].any() and (edited[:, 2] != clean[:, 2]).any()


def test_own_steps_end_before_the_answer(tiny_runs, problems_of):
    subject = Subject.load(tiny_runs["m1"])
    prompts = subject.prompts(problems_of(subject))
    for steps, record in zip(subject.own_steps(prompts), subject.answers(prompts)):
        text = subject.tokenizer.decode(steps)
        assert "#" not in text
        assert text.strip() == record["output"].split("#")[0].strip()


def test_fewer_more_and_no_thoughts(tiny_runs, problems_of):
    subject = Subject.load(tiny_runs["m3"])
    problems = problems_of(subject)
    for n in (0, 1, 5):
        (ids,) = subject.prompts(problems, [4], n_thoughts=n).tokens
        assert (ids == subject.ids.latent).sum() == n and (ids == subject.ids.start).sum() == 1
    (bare,) = subject.prompts(problems, [4], n_thoughts=0, markers=False).tokens
    assert np.array_equal(bare, problems.table.question[4])
    with pytest.raises(ValueError, match="markers"):
        subject.prompts(problems, [4], n_thoughts=2, markers=False)
    assert subject.prompts(problems, [4]).slots.tolist() == [[len(bare) + 1, len(bare) + 2]]


def test_epochs_by_name(tiny_runs, tmp_path):
    folder = tiny_runs["m3"]
    assert find_epoch(folder).name == "checkpoint_3" and find_epoch(folder, "1").name == "checkpoint_1"
    assert find_epoch(folder / "checkpoint_2", "final").name == "checkpoint_2"
    with pytest.raises(ValueError, match="no checkpoint_9; it has 1, 2, 3"):
        find_epoch(folder, "9")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"max_latent_stage": 2, "epochs_per_stage": 1}}))
    evals = [(0, 0.99), (1, 0.5), (2, 0.7), (3, 0.8), (4, 0.8)]
    lines = [json.dumps({"event": "eval", "epoch": e, "eval/acc": a}) for e, a in evals]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for n in (1, 2, 3, 4, 5):
        (tmp_path / f"checkpoint_{n}").write_text("")
    assert best_epoch(tmp_path) == 4, "the earliest of the best that saw the whole curriculum"


@pytest.mark.parametrize("backbone", ["prosqa_tiny", "prosqa_words"])
def test_places_of_a_question(backbone):
    tokenizer = load_tokenizer(f"backbones/{backbone}")
    row = {
        "question": "Every felpus is a bompus. Stella is a felpus. Wren is a gerpus. Every gerpus is a boompus. "
        "Is Wren a boompus or bompus?",
        "steps": ["Wren is a gerpus.", "Every gerpus is a boompus."],
    }
    places, words = Places.of(row, tokenizer), tokenizer.convert_ids_to_tokens(tokenizer(row["question"] + "\n")["input_ids"])
    said = [[words[i] for i in fact] for fact in places.facts]
    assert [[w for w in fact if w.endswith("pus") or w[0] in "SW"] for fact in said] == [
        ["felpus", "bompus"],
        ["Stella", "felpus"],
        ["Wren", "gerpus"],
        ["gerpus", "boompus"],
    ]
    assert all(fact[-1] == "." for fact in said) and places.on_path == [False, False, True, True]
    assert [words[i] for i in places.person] == ["Wren"] and max(places.path) < places.person[0]
    assert [[words[i] for i in option] for option in places.options] == [["boompus"], ["bompus"]]
    assert sorted(places.path + places.off_path) == places.all_facts and places.n_tokens == len(words)
    with pytest.raises(ValueError, match="no ProsQA question"):
        Places.of({"question": "How many eggs are left?", "steps": []}, tokenizer)


def test_positions_fill_up_with_nowhere():
    assert positions([[1, 2], [], [3]]).tolist() == [[1, 2], [NOWHERE, NOWHERE], [3, NOWHERE]]
