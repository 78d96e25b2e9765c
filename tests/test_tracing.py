"""Tracing finds what was planted, where it was planted, and notices when its own instruments are broken."""

from functools import partial

import numpy as np
import pytest
import torch
from evaluate_material import slow_logits
from stub_model import SOLVED, Wiring, _Block, stub_subject, write_problems

from analysis import effects, tracing
from analysis.command import CheckFailed
from analysis.interventions import NOWHERE, Patch, Recorder, chain, gaussian
from analysis.subject import Problems, Subject, positions
from analysis.tracing import Asked, Chunk, Group
from two_choice import Options

N = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data"), N, hops=(1, 2))


@pytest.fixture
def stub(tmp_path, data):
    """stub(wiring, ...) -> (subject, its thoughts as a group)."""

    def made(wiring, **options):
        subject = stub_subject(tmp_path, wiring, **options)
        traced = tracing.rows_to_trace(subject, Problems.read(data / "prosqa_test.json", subject.tokenizer), 50)
        assert traced.counts()["n_traced"] == N
        slots = traced.asked.prompts.slots.tolist()
        group = Group.of("thoughts", traced.asked, {"slot": slots}, 20)
        group.noise_std = tracing.own_std(subject, group)
        return subject, group

    return made


def found(subject, group) -> dict:
    records = tracing.trace(subject, group, range(N), 0)
    effects.check(group, records)
    return effects.summary(group, records)


# ---------------------------------------------------------------- planted circuits


@pytest.mark.parametrize("reads, n_layers", [(0, 1), (1, 2), (2, 2)])
def test_only_the_thought_that_is_read_has_an_effect(stub, reads, n_layers):
    """Thought 1 copies thought 0; with all slots given, only the one that the answer is read from counts."""
    wiring = Wiring(thoughts=(SOLVED, 0, 0), reads=(reads,))
    effect = found(*stub(wiring, n_layers=n_layers))
    planted = np.zeros((n_layers + 1, 3))
    planted[:n_layers, reads] = 1  # handed on by every block that something reads
    assert np.allclose(effect["mean_ce"], planted, atol=1e-6)
    assert effect["effect"] == effect["peak_ce"] == pytest.approx(1) and effect["peak_position"] == reads
    assert effect["peak_label"] == f"slot {reads}" and effect["total_effect"]["ci95"][0] > 10
    assert effect["ce_above_03_fraction"] == pytest.approx(1 / 3) and effect["position_counts"] == [N] * 3
    assert effect["mean_ce_from_end"][0] == effect["mean_ce"][0][::-1]  # rows of one length
    assert effect["clean_gt_corrupt_fraction"] == 1 and effect["epsilon_sensitivity_pct"] == 0 and effect["valid"]


class Mover(_Block):
    """The first block: what slot 2 hands on is what slot 0 carries."""

    def __init__(self, words, n):
        super().__init__(0)
        self.words, self.n = words, n

    def write(self, x_BCD, seen_BTD):
        out_BCD, first = x_BCD.clone(), seen_BTD.shape[1] - x_BCD.shape[1]
        for b, start in (seen_BTD[..., self.words.ids.start] > 0.5).nonzero().tolist():
            if first <= start + 3 < seen_BTD.shape[1]:
                out_BCD[b, start + 3 - first, self.n : 2 * self.n] = seen_BTD[b, start + 1, self.n : 2 * self.n]
        return out_BCD


def test_a_circuit_is_found_at_its_layers_and_positions_and_nowhere_else(stub):
    """Block 1 moves slot 0 to slot 2, and the last block reads slot 2: cells (0, 0), (1, 2), (2, 2)."""
    subject, group = stub(Wiring(thoughts=(SOLVED, None, None), reads=(0,)), n_layers=3)
    base = subject.model.base_causallm
    base.base_model.blocks[0] = Mover(base.words, base.base_model.blocks[-1].n)
    base.base_model.blocks[-1].wiring = Wiring(thoughts=(SOLVED, None, None), reads=(2,))
    effect = found(subject, group)
    planted = np.zeros((4, 3))
    planted[0, 0] = planted[1, 2] = planted[2, 2] = 1
    assert np.allclose(effect["mean_ce"], planted, atol=1e-6)
    assert np.allclose(effect["mean_ce_all"], [1, 1, 1, 0], atol=1e-6)


def test_thoughts_that_do_nothing_have_no_effect_instead_of_a_ratio(stub):
    effect = found(*stub(Wiring(thoughts=(None, None)), mode="learned_shared"))
    assert effect["effect"] is None and effect["reason"] == "no effect to trace"
    assert effect["mean_ce"] is effect["peak_ce"] is effect["ce_above_03_fraction"] is None
    assert effect["total_effect"]["value"] == pytest.approx(0, abs=1e-6) and effect["total_effect"]["n"] == N
    assert effect["epsilon_sensitivity_pct"] == 100 and effect["clean_gt_corrupt_fraction"] < 1


def test_restored_positions_are_met_in_every_row_and_draws_belong_to_rows(stub):
    """Rows of other lengths, other batches, other chunks: the same margins."""
    subject, group = stub(Wiring(thoughts=(SOLVED, 0), reads=(1,)), n_layers=1)
    whole = tracing.trace(subject, group, range(N), 0)
    subject.batch_size = 5
    parts = tracing.trace(subject, group, [7, 3], 0) + tracing.trace(subject, group, [0], 0)
    for record, row in zip(parts, (7, 3, 0)):
        assert np.allclose(record["restored"], whole[row]["restored"]) and record["corrupted"] == whole[row]["corrupted"]
    other = tracing.trace(subject, group, [0], 1)[0]
    assert other["corrupted"] != whole[0]["corrupted"] and other["clean"] == whole[0]["clean"]


# ---------------------------------------------------------------- broken instruments


def other_rows(restore, self, layer, row_I, which_IK):
    return restore(self, layer, row_I.roll(len(row_I) // 2), which_IK)


def a_position_off(restore, self, layer, row_I, which_IK):
    noise, back = restore(self, layer, row_I, which_IK)
    back.positions_PK = torch.where(back.positions_PK == NOWHERE, NOWHERE, back.positions_PK + 1)
    return noise, back


def never_nothing(restore, self, layer, row_I, which_IK):
    return restore(self, layer, row_I, which_IK | ~which_IK.any(1, keepdim=True))


def beyond_the_prompt(restore, self, layer, row_I, which_IK):
    noise, back = restore(self, layer, row_I, which_IK)
    back.positions_PK = torch.where(back.positions_PK == NOWHERE, NOWHERE, 200)
    return noise, back


@pytest.mark.parametrize(
    "broken, message",
    [
        (other_rows, "all positions restored"),
        (a_position_off, "all positions restored"),
        (never_nothing, "nothing restored"),
        (beyond_the_prompt, "aimed at"),
    ],
)
def test_gates_notice_broken_patching(stub, monkeypatch, broken, message):
    subject, group = stub(Wiring(thoughts=(SOLVED, None), reads=(0,)), n_layers=1)
    restore = Chunk.restore
    monkeypatch.setattr(Chunk, "restore", lambda self, *rest: broken(restore, self, *rest))
    with pytest.raises(CheckFailed, match=message):
        found(subject, group)


def test_a_corruption_that_misses_is_no_missing_effect(stub, monkeypatch):
    """Noise that lands nowhere leaves the clean margin, which would read as "no effect to trace"."""
    subject, group = stub(Wiring(thoughts=(SOLVED,), reads=(0,)), n_layers=1)
    missing = torch.where(group.place_RK == NOWHERE, NOWHERE, 200)
    monkeypatch.setattr(Chunk, "corrupt", lambda self, which_RK: Patch(0, missing[: len(which_RK)], self.noise_RKD))
    with pytest.raises(CheckFailed, match="met 0"):
        found(subject, group)


# ---------------------------------------------------------------- margins, on a real checkpoint


@pytest.fixture(scope="module")
def real(tiny_runs, small_data):
    subject = Subject.load(tiny_runs["m3"], device="cpu")
    problems = Problems.read(small_data / "prosqa_valid.json", subject.tokenizer)
    prompts = subject.prompts(problems)
    return subject, prompts, Asked.of(subject, prompts)


def slow_margin(subject, row, tokens, logits) -> float:
    """Of the options' pieces alone, read off one unpadded row; `logits(ids, n_prompt)` -> [T, V]."""
    options, sums = Options.of(row, [], 0, subject.model, subject.tokenizer), []
    for answer in options.answers:
        ids = [*tokens.tolist(), *answer]
        logp = logits(ids, len(tokens)).log_softmax(-1)
        first = len(tokens) + options.n_name
        assert subject.tokenizer.decode(ids[first - 1]).strip() in row["idx_to_symbol"][row["root"]]
        sums.append(sum(logp[t - 1, ids[t]].item() for t in range(first, len(ids))))
    return sums[0] - sums[1]


def test_margins_are_those_of_the_species_and_not_of_the_name(real):
    subject, prompts, asked = real
    slow = [slow_margin(subject, *pair, partial(slow_logits, subject.model)) for pair in zip(prompts.rows, prompts.tokens)]
    assert np.allclose(asked.margins(subject), slow, atol=1e-4)
    assert np.allclose(asked.margins(subject), [r["margin"] for r in subject.scores(prompts)], atol=1e-4)
    said = {t for tails in asked.tails for tail in tails for t in tail}
    assert not said & {subject.tokenizer.encode(row["idx_to_symbol"][row["root"]])[0] for row in prompts.rows}


def test_the_answer_prefix_can_be_edited(real):
    """Noise in place of the name in front of the answer, against one row at a time with the embedding replaced by hand."""
    subject, prompts, asked = real
    names = positions([[len(tokens) - 1] for tokens in asked.prompts.tokens])
    noise = gaussian(0, list(range(len(prompts))), 1, subject.width)
    edited = asked.margins(subject, Patch(0, names, noise))
    assert np.abs(edited - asked.margins(subject)).min() > 1e-4
    base = subject.model.base_causallm

    @torch.no_grad()
    def by_hand(noise_D, ids, n_prompt):
        fed = subject.model(torch.tensor([ids[:n_prompt]])).inputs_embeds  # thoughts filled
        embeds = torch.cat([fed, base.get_input_embeddings()(torch.tensor([ids[n_prompt:]]))], 1)
        embeds[0, n_prompt + 1] = noise_D
        return base(inputs_embeds=embeds).logits[0]

    for i, (row, tokens) in enumerate(zip(prompts.rows, prompts.tokens)):
        assert edited[i] == pytest.approx(slow_margin(subject, row, tokens, partial(by_hand, noise[i, 0])), abs=1e-4)


def test_block_outputs_are_restored_before_the_final_norm(real):
    """Noise in the marker that thought 0 is read from, its clean last block output put back: thought 0 is as it was."""
    subject, prompts, asked = real
    group = Group.of("markers", asked, {"marker": (prompts.slots[:, :1] - 1).tolist()}, 1)
    last = subject.n_layers
    recorder = Recorder(range(last + 1), group.place_RK, subject.width)
    asked.margins(subject, recorder)
    noise = gaussian(0, list(range(len(prompts))), 1, subject.width)
    chunk, every = Chunk(subject, group, recorder.states, noise), torch.arange(len(prompts))
    clean, noisy = subject.thoughts(asked.prompts), subject.thoughts(asked.prompts, chunk.corrupt(group.place_RK != NOWHERE))
    patches = chunk.restore(last, every, torch.ones(len(prompts), 1, dtype=torch.bool))
    restored = subject.thoughts(asked.prompts, chain(*patches))
    assert (noisy[:, 0] - clean[:, 0]).abs().amax(-1).min() > 1e-2
    assert torch.allclose(restored[:, 0], clean[:, 0], atol=1e-5)
    assert (recorder.states[last][:, 0] - clean[:, 0]).abs().max() > 1e-2  # the norm does something


# ---------------------------------------------------------------- effects from records


def record(clean, corrupted, restored, **more) -> dict:
    """One layer; `restored`: a margin a bin."""
    curves = [None if x is None else [x] for x in restored]
    return {"clean": clean, "corrupted": corrupted, "restored": curves, "all": [clean], "none": [corrupted]} | {
        "extras": {}, "parts": {}, "n_positions": len(restored), **more
    }  # fmt: skip


def group_of(n: int, names=("slot",)) -> Group:
    return Group("test", None, None, None, None, list(names), [(names[0], i) for i in range(n)])


def test_the_effect_is_a_ratio_of_means_and_no_mean_of_ratios():
    """Six rows react by 1 nat and recover wholly, six by 9 and not at all: 6 / 60, not 1 / 2."""
    rows = [record(1.0, 0.0, [1.0])] * 6 + [record(9.0, 0.0, [0.0])] * 6
    effect = effects.summary(group_of(1), rows)
    assert effect["mean_ce"] == [[pytest.approx(0.1)]] and effect["mean_denominator"] == pytest.approx(5)
    low, high = effect["peak_ce_ci95"]
    assert 0 < low < 0.1 < high < 0.5


def test_an_interval_that_reaches_below_half_a_nat_is_no_effect():
    few = [record(x, 0.0, [x]) for x in [4.0, -3.0] * 6]  # mean 0.5, wide
    assert effects.summary(group_of(1), few)["effect"] is None
    above = effects.summary(group_of(1), [record(x, 0.0, [x]) for x in [0.7, 0.6] * 6])
    assert above["effect"] == pytest.approx(1) and above["total_effect"]["ci95"][0] > 0.5


def test_positions_say_how_many_rows_they_stand_for():
    """Ten rows of three positions and five of two: aligned from the start and from the end, the last one is another."""
    rows = [record(2.0, 0.0, [0.0, 0.0, 2.0])] * 10 + [record(2.0, 0.0, [0.0, 2.0, None])] * 5
    effect = effects.summary(group_of(3), rows)
    assert effect["position_counts"] == [15, 15, 10] and effect["mean_ce"] == [[0.0, pytest.approx(1 / 3), 1.0]]
    assert effect["position_counts_from_end"] == [15, 15, 10] and effect["mean_ce_from_end"] == [[1.0, 0.0, 0.0]]
    assert effect["ce_above_03_fraction"] == pytest.approx(2 / 3)
    assert effect["ce_above_03_fraction_from_end"] == pytest.approx(1 / 3)
    fewer = effects.summary(group_of(3), rows[1:])
    assert fewer["mean_ce"][0][2] is None and fewer["position_counts"] == [14, 14, 9]
    assert fewer["ce_above_03_fraction"] == pytest.approx(1 / 2)  # of the two positions that have enough rows


def test_a_position_of_rows_that_do_not_react_has_no_effect():
    """Ten rows that react by 9 nats, and ten longer ones by next to nothing: no ratio of the longer ones' last position."""
    rows = [record(9.0, 0.0, [9.0, None])] * 10 + [record(0.01, 0.0, [0.0, 5.0])] * 10
    effect = effects.summary(group_of(2), rows)
    assert effect["mean_ce"] == [[pytest.approx(9 / 9.01), None]] and effect["peak_ce"] < 1
    assert [total["n"] for total in effect["position_total_effect"]] == effect["position_counts"] == [20, 10]
    assert effect["position_total_effect"][1]["value"] == pytest.approx(0.01)


def test_nothing_is_said_of_too_few_rows():
    effect = effects.summary(group_of(1), [record(9.0, 0.0, [9.0])] * 9)
    assert "effect" not in effect and effect["mean_ce"] is None and "9 rows" in effect["reason"]
    nothing = effects.summary(group_of(1), [])
    assert "effect" not in nothing and nothing["n_traced"] == 0 and nothing["total_effect"]["value"] is None


def test_validity_counts_rows_and_cells():
    rows = [record(3.0, 0.0, [4.5, 0.0])] * 8 + [record(0.0, 0.005, [0.0, 0.0])] * 4
    effect = effects.summary(group_of(2), rows)
    assert effect["clean_gt_corrupt_fraction"] == pytest.approx(2 / 3) and effect["ce_in_range_fraction"] == 0.5
    assert effect["epsilon_sensitivity_pct"] == pytest.approx(100 / 3) and effect["valid"] is False
    assert not any(effect["validity"].values())


# ---------------------------------------------------------------- which positions


def test_positions_are_thinned_evenly_and_shared_out():
    assert tracing.thin(5, 20).tolist() == [0, 1, 2, 3, 4]
    assert tracing.thin(41, 5).tolist() == [0, 10, 20, 30, 40]
    assert len(set(tracing.thin(21, 20).tolist())) == 20
    assert tracing.shares({"path": 30, "other": 60, "name": 2}, 20) == {"name": 2, "path": 9, "other": 9}
    assert tracing.shares({"path": 3, "other": 60, "name": 2}, 20) == {"name": 2, "path": 3, "other": 15}


def test_bins_of_parts_keep_their_place_in_rows_that_lack_some(real):
    _, _, asked = real
    parts = {"a": [[4, 5, 6], [2]], "b": [[9], [8, 9]]}
    group = Group.of("x", asked.take([0, 1]), parts, 4)
    assert group.labels == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    places = [[NOWHERE if k == NOWHERE else int(row[k]) for k in bins] for row, bins in zip(group.place_RK, group.bin_RP)]
    assert places == [[4, 6, 9, NOWHERE], [2, NOWHERE, 8, 9]]
