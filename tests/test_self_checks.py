"""Each self-check fails on the fault that it is there for, and passes on every real checkpoint."""

import pytest
import torch

import coconut
import taps
from analysis.command import CheckFailed
from analysis.interventions import Patch
from analysis.self_checks import self_checks
from analysis.subject import Problems, Subject

KEYS = ("m0", "m1", "m3", "m4", "m4b", "m5")


def checked(folder, data, change=None) -> dict:
    subject = Subject.load(folder)
    if change:
        change(subject)
    return self_checks(subject, Problems.read(data / "prosqa_valid.json", subject.tokenizer))


def failing(folder, data, change=None) -> set[str]:
    with pytest.raises(CheckFailed) as failed:
        checked(folder, data, change)
    names = ("identity", "self_replay", "recorded", "processed", "one_function", "positive_control")
    return {name for name in names if f"{name}: " in str(failed.value)}


@pytest.mark.parametrize("key", KEYS)
def test_real_checkpoints_pass(tiny_runs, small_data, key):
    found = checked(tiny_runs[key], small_data)
    assert all(check["passed"] for check in found.values())
    skipped = {name for name, check in found.items() if "skipped" in check}
    thinks, pauses = key in ("m3", "m4", "m4b", "m5"), key in ("m4", "m4b", "m5")
    assert skipped == (set() if thinks else {"self_replay"}) | (set() if pauses else {"one_function"})
    assert found["recorded"]["n"] == 11 and (not thinks or found["self_replay"]["slots_replaced"] == 22)


def test_an_edit_that_leaves_a_trace(tiny_runs, small_data, monkeypatch):
    real = taps.edited
    monkeypatch.setattr(taps, "edited", lambda edit, layer, pass_, x: real(edit, layer, pass_, x) + 0.01 * (layer > 0))
    assert "identity" in failing(tiny_runs["m5"], small_data)


@pytest.mark.parametrize("key", ["m3", "m4", "m5"])
def test_thoughts_put_back_in_the_wrong_place(tiny_runs, small_data, monkeypatch, key):
    """Shifted by one slot. In a pause mode all slots hold one vector, so nothing is wrong there, and nothing is found."""
    real = Subject.thoughts
    monkeypatch.setattr(Subject, "thoughts", lambda self, prompts: real(self, prompts).roll(1, 1))
    if key == "m3":
        assert failing(tiny_runs[key], small_data) == {"self_replay"}
    else:
        assert checked(tiny_runs[key], small_data)["self_replay"]["passed"]


def test_a_patch_that_misses_its_slots(tiny_runs, small_data, monkeypatch):
    """A pause mode would look replayed even if nothing were replaced: hits are counted."""
    monkeypatch.setattr(Patch, "__call__", lambda self, layer, pass_, x: None)
    assert "self_replay" in failing(tiny_runs["m5"], small_data)


def test_weights_that_are_not_those_of_the_record(tiny_runs, small_data):
    def change(subject):
        with torch.no_grad():
            for parameter in subject.model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    recorded = checked(tiny_runs["m1"], small_data)["recorded"]
    if recorded["correct"]:  # a model that is right nowhere stays so
        assert "recorded" in failing(tiny_runs["m1"], small_data, change)
    else:
        assert recorded["recorded"] == 0


def test_embeddings_that_are_not_those_fed(tiny_runs, small_data, monkeypatch):
    real = coconut.Coconut.forward

    def forward(self, *args, **options):
        out = real(self, *args, **options)
        return out._replace(inputs_embeds=out.inputs_embeds + torch.linspace(-0.1, 0.1, 128))

    monkeypatch.setattr(coconut.Coconut, "forward", forward)
    assert failing(tiny_runs["m3"], small_data) == {"processed"}


def test_a_pause_mode_that_reads_states_after_all(tiny_runs, small_data):
    def change(subject):
        feedback, pause = subject.model.feedback, subject.model.pause_embedding
        feedback.forward = lambda k, h: pause if h is None else pause + 0.5 * h

    assert "one_function" in failing(tiny_runs["m5"], small_data, change)


def test_a_model_that_knows_the_answer_without_facts(tiny_runs, small_data):
    def change(subject):
        real = subject.answers
        subject.answers = lambda *args: [record | {"two_choice_correct": True} for record in real(*args)]

    problems = small_data  # 11 rows: 3 standard errors are 45 points
    assert failing(tiny_runs["m3"], problems, change) == {"positive_control"}
