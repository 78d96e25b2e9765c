"""Which rows meet in a batch: each once, rows of like length together, drawn anew every epoch; and batches made ahead."""

import threading

import numpy as np
import pytest

from backbones import add_thought_tokens, load_tokenizer
from batches import _bucketed, epoch_batches, padding_share, prefetched
from dataset import Lengths, get_cot_latent_dataset, padded_layout
from tokens import TokenTable, get_dataset
from utils import check_config

GSM_STAGES = (0, 4)  # all steps written; none left


def lengths_like_gsm(n_rows: int, stage: int, seed: int = 0) -> Lengths:
    """Rows of the token counts of GSM8K-Aug: questions of mean 58 and at most 183, steps 28 and 89, answers 3.1."""
    rng = np.random.default_rng(seed)

    def log_normal(mean, most, sigma, scale):
        draws = np.exp(sigma * rng.standard_normal(n_rows))
        return np.clip(np.rint(draws * scale * mean / draws.mean()), 5, most).astype(np.int64)

    # Scaled so that the means come out after rounding and clipping.
    question, steps = log_normal(58, 183, 0.35, 1.0), log_normal(28, 89, 0.5, 1.005)
    answer = 3 + (rng.random(n_rows) < 0.1)
    latents = np.full(n_rows, 2 * min(stage, 3))
    labelled = answer + (steps if stage == 0 else 0)
    return Lengths(question + 1, question + 2 + latents + labelled, labelled, latents)


def random_lengths(n: int, latents: bool = True) -> Lengths:
    rng = np.random.default_rng(0)
    prefix, rest = rng.integers(5, 200, n), rng.integers(1, 60, n)
    return Lengths(prefix, prefix + rest, np.ones(n, dtype=int), np.full(n, 3 * latents))


GIVEN = {"plain": lambda n: None, "latents": random_lengths, "none": lambda n: random_lengths(n, latents=False)}


def efficiency(lengths, size, seed=0, epoch=0) -> float:
    return 1 - padding_share(lengths, epoch_batches(len(lengths.total), size, seed, epoch, lengths))


# ---------------------------------------------------------------- each row once, in an order of its own


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("n", "size"), [(103, 8), (64, 8), (5, 8), (1, 1), (2000, 16), (40_001, 32)])
def test_an_epoch_visits_each_row_once(n, size, given):
    batches = epoch_batches(n, size, 0, 0, GIVEN[given](n))
    assert np.sort(np.concatenate(batches)).tolist() == list(range(n))
    assert [len(batch) for batch in batches] == [size] * (n // size) + [n % size] * (n % size > 0)


@pytest.mark.parametrize("given", GIVEN)
def test_epochs_and_seeds_have_orders_of_their_own(given):
    def order(seed, epoch):
        return tuple(np.concatenate(epoch_batches(100, 8, seed, epoch, GIVEN[given](100))).tolist())

    assert order(3, 4) == order(3, 4)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)} | {tuple(range(100))}) == 10


@pytest.mark.parametrize("stage", GSM_STAGES)
def test_rows_meet_others_in_the_next_epoch(stage):
    n, lengths = 20_000, lengths_like_gsm(20_000, stage)
    first, second = (epoch_batches(n, 32, 0, epoch, lengths) for epoch in (0, 1))
    place = np.empty(n, dtype=int)
    for number, batch in enumerate(second):
        place[batch] = number
    again = np.mean([(place[batch][:, None] == place[batch]).sum() - 32 for batch in first[:625]]) / (32 * 31)
    assert again < 0.25


@pytest.mark.parametrize("given", ["latents", "none"])
def test_short_and_long_batches_come_mixed(given):
    lengths = GIVEN[given](3000)
    means = np.array([lengths.total[batch].mean() for batch in epoch_batches(3000, 8, 0, 0, lengths)])
    assert 0.4 < (np.diff(means) > 0).mean() < 0.6
    assert means[:100].std() > 0.8 * means.std() > 20


def test_the_smaller_batch_is_last_and_not_always_of_the_same_rows():
    lengths = random_lengths(83)
    last = [epoch_batches(83, 8, 0, epoch, lengths)[-1] for epoch in range(40)]
    assert {len(batch) for batch in last} == {3}
    assert len({frozenset(batch.tolist()) for batch in last}) > 5


# ---------------------------------------------------------------- padding


def test_share_of_padding_written_out():
    lengths = Lengths(*(np.array(x) for x in ([3, 5, 4, 9], [10, 7, 4, 9], [1, 1, 1, 1], [2, 1, 0, 0])))
    both, mixed, none = np.array([0, 1]), np.array([1, 2]), np.array([2, 3])
    assert padding_share(lengths, [both]) == pytest.approx(1 - 17 / 24)  # 5 columns before the latents and 7 from there on
    assert padding_share(lengths, [mixed]) == pytest.approx(1 - 11 / 14)  # a row without latents is not moved
    assert padding_share(lengths, [none]) == pytest.approx(1 - 13 / 18)
    assert padding_share(lengths, [both, none]) == pytest.approx(1 - 30 / 42)
    assert padding_share(lengths, [both], prefix_multiple=4) == pytest.approx(1 - 17 / 30)  # 8 and 7 columns
    assert padding_share(lengths, [both], prefix_multiple=8) == pytest.approx(1 - 17 / 32)  # 8, 7, and one to an even width


@pytest.fixture(scope="module")
def prosqa_rows(shared_data):
    """The official validation rows of a stage, in GPT-2 tokens."""
    tokenizer = load_tokenizer(str(shared_data / "gpt2_tokenizer"))
    ids = add_thought_tokens(tokenizer)
    table = TokenTable(get_dataset(shared_data / "prosqa_valid.json", tokenizer))
    paths = dict.fromkeys(("name", "save_path", "train_path", "val_path"), "x")
    config = check_config(paths | {"coconut": True, "max_latent_stage": 6}, "test")
    return lambda stage: get_cot_latent_dataset(stage, table, config, ids.start, ids.latent, ids.end)


@pytest.mark.parametrize("stage", [0, 6])
def test_official_rows_are_padded_by_less_than_five_percent(prosqa_rows, stage):
    lengths = prosqa_rows(stage).lengths()
    assert min(efficiency(lengths, 32, epoch=epoch) for epoch in range(30)) >= 0.95
    assert 1 - padding_share(lengths, epoch_batches(300, 32, 0, 0)) < 0.8  # as they come


@pytest.mark.parametrize("stage", [0, 3, 6])
def test_share_of_padding_is_that_of_the_batches_made(prosqa_rows, stage):
    rows = prosqa_rows(stage)
    batches = epoch_batches(300, 16, 0, 0, rows.lengths())
    for multiple in (1, 64):
        real = [rows.batch(numbers, 0, prefix_multiple=multiple)["attention_mask"].double() for numbers in batches]
        share = 1 - sum(mask.sum() for mask in real) / sum(mask.numel() for mask in real)
        assert padding_share(rows.lengths(), batches, multiple) == pytest.approx(float(share))


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("stage", GSM_STAGES)
@pytest.mark.parametrize("n", [20_000, 385_000])
def test_short_rows_are_padded_by_less_than_five_percent(n, stage, size):
    lengths = lengths_like_gsm(n, stage)
    assert efficiency(lengths, size) >= 0.95
    if n == 20_000:
        assert 1 - padding_share(lengths, epoch_batches(n, size, 0, 0)) < 0.65


def test_the_sample_of_lengths_is_like_gsm():
    written, thought = (lengths_like_gsm(385_000, stage) for stage in GSM_STAGES)
    question, answer = written.prefix - 1, thought.labelled
    assert question.mean() == pytest.approx(58, abs=0.5) and question.max() == 183
    assert (written.labelled - answer).mean() == pytest.approx(28, abs=0.5)
    assert (written.labelled - answer).max() == 89 and answer.mean() == pytest.approx(3.1, abs=0.01)
    assert thought.total.mean() == pytest.approx(69, abs=0.5)  # what the padding of a last stage is measured against


def test_rows_whose_prefix_and_rest_both_vary_are_cut_both_ways():
    lengths = random_lengths(20_000)
    by_prefix = np.lexsort((lengths.total, lengths.prefix)).reshape(-1, 32)
    assert efficiency(lengths, 32) > 0.93 > 0.9 > 1 - padding_share(lengths, by_prefix)


def test_no_more_is_grouped_than_five_percent_ask_for():
    """Rows whose prefixes say nothing of the rest, and rests that hardly differ: batches keep rows of every rest."""
    rng = np.random.default_rng(2)
    prefix, text = rng.integers(40, 90, 6400), rng.integers(0, 4, 6400)
    latents = np.full(6400, 2)
    lengths = Lengths(prefix, prefix + latents + 1 + text, text, latents)
    batches = epoch_batches(6400, 64, 0, 0, lengths)
    spread = np.mean([text[batch].std() for batch in batches])
    assert spread > 0.9 * text.std(), "within a batch nearly as varied as overall"
    assert padding_share(lengths, batches) < 0.05


@pytest.mark.parametrize("size", [8, 32])
def test_rows_of_one_prefix_fill_batches_of_their_own_where_buckets_are_needed(size):
    lengths = lengths_like_gsm(20_000, stage=4)
    batches = _bucketed(np.random.default_rng(0).permutation(20_000), lengths.prefix, lengths.total - lengths.prefix, size)
    aligned = [not padded_layout(lengths.of(batch))[0].any() for batch in batches]
    assert np.mean(aligned) > 0.75


# ---------------------------------------------------------------- batches made ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetched")]


@pytest.mark.parametrize("depth", [0, 1, 4, 50])
def test_made_in_order_by_one_other_thread(depth):
    made = list(prefetched(lambda i: (i * i, threading.get_ident()), range(20), depth))
    assert [square for square, _ in made] == [i * i for i in range(20)]
    assert len({thread for _, thread in made}) == 1 and made[0][1] != threading.get_ident()
    assert not threads() and list(prefetched(str, [])) == []


def test_runs_ahead_by_the_depth_and_no_further():
    begun, fourth = [], threading.Event()

    def make(i):
        begun.append(i)
        if i == 4:
            fourth.set()
        return i

    ahead = prefetched(make, range(100), depth=4)
    assert begun == [] and next(ahead) == 0
    assert fourth.wait(20)  # while nobody asks for a second
    assert begun == [0, 1, 2, 3, 4] and next(ahead) == 1
    ahead.close()


def test_an_error_is_raised_in_its_place():
    def make(i):
        if i == 3:
            raise KeyError("third")
        return i

    seen = []
    with pytest.raises(KeyError, match="third"):
        for made in prefetched(make, range(10), depth=6):
            seen.append(made)
    assert seen == [0, 1, 2] and not threads()


def test_leaving_early_ends_the_thread_and_what_is_not_begun():
    begun, held, hold = [], threading.Event(), threading.Event()

    def make(i):
        begun.append(i)
        if i:
            held.set()
            assert hold.wait(20)
        return i

    ahead = prefetched(make, range(100), depth=8)
    assert next(ahead) == 0 and len(threads()) == 1 and held.wait(20)
    threading.Timer(0.05, hold.set).start()
    ahead.close()  # waits for item 1, which is held; drops those behind it
    assert hold.is_set() and not threads() and len(begun) <= 2
    for _ in prefetched(str, range(100)):
        break
    assert not threads()
