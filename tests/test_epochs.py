"""What an epoch consists of where the config says: a number of updates, or the rows of the levels reached."""

import json

import numpy as np
import pytest
import torch

import run
from dataset import COCONUTDataset, training_stage
from tokens import load_rows


def steps(folder) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["event"] == "step"]


def test_steps_per_epoch_repeats_the_rows_and_resumes_exactly(make, tmp_path):
    """44 rows in batches of 8 are 6 updates; 8 begin a second pass in another order."""
    keys = {"steps_per_epoch": 8, "num_epochs": 2, "use_lr_scheduler": True, "log_every": 1, "reset_optimizer": False}
    assert run.main([make("whole", **keys)]) == 0
    whole = steps(tmp_path / "runs/whole")
    assert [(r["epoch"], r["stage"]) for r in whole] == [(0, 0)] * 8 + [(1, 1)] * 8
    assert len({r["rows"] for r in whole}) == 16, "no batch comes again"
    assert [r["train/step"] for r in whole] == [*range(16)]
    rates = [r["lr"] for r in whole]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.02 * rates[0], "the cosine ends with the last update"
    config = make("cut", **keys)
    assert run.main([config, "max_steps=11"]) == 0 and run.main([config]) == 0
    files = [torch.load(tmp_path / "runs" / name / "checkpoint_2", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_steps_per_epoch_may_be_a_part_of_a_pass(make, tmp_path):
    assert run.main([make("part", steps_per_epoch=2, num_epochs=1, max_latent_stage=0)]) == 0
    assert len(steps(tmp_path / "runs/part")) == 2


def test_levels_come_in_one_after_the_other(make, tmp_path, small_data):
    rows = load_rows(small_data / "prosqa_train.json")
    for i, row in enumerate(rows):
        row["level"] = i % 3
    (tmp_path / "levels.json").write_text(json.dumps(rows))
    keys = {"train_path": str(tmp_path / "levels.json"), "num_epochs": 4, "batch_size_training": 1, "use_lr_scheduler": True}
    assert run.main([make("levels", level_epochs=[1, 3], log_every=1, max_latent_stage=0, **keys)]) == 0
    made = steps(tmp_path / "runs/levels")
    of_epoch = [sum(r["epoch"] == e for r in made) for e in range(4)]
    counts = np.bincount([i % 3 for i in range(44)])
    assert of_epoch == [counts[0], counts[:2].sum(), counts[:2].sum(), 44]
    assert [r["train/step"] for r in made] == [*range(len(made))]
    assert made[-1]["lr"] < 0.02 * made[0]["lr"], "the schedule knows how long epochs are"


def test_levels_without_a_row_are_refused(make, tmp_path, small_data, capsys):
    rows = [row | {"level": 2} for row in load_rows(small_data / "prosqa_train.json")]
    (tmp_path / "levels.json").write_text(json.dumps(rows))
    assert run.main([make("none", level_epochs=[1], train_path=str(tmp_path / "levels.json"))]) == 2
    assert "no row of level 0" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text(json.dumps([rows[0] | {"level": "high"}]))
    with pytest.raises(ValueError, match=r"row 0: `level` must be a whole number, is 'high'"):
        load_rows(tmp_path / "bad.json")


# ---------------------------------------------------------------- LAHR's rule of latents, and the names its users know


class Curriculum:
    max_latent_stage, c_thought, pad_latent_to_max, no_cot, latents_follow_steps = 4, 2, False, False, True


def test_latents_follow_steps():
    drop, latents = training_stage(np.array([3, 4, 6]), 4, Curriculum)
    assert drop.tolist() == [3, 4, 4] and latents.tolist() == [6, 8, 8]
    drop, latents = training_stage(np.array([3, 4, 6]), 5, Curriculum)
    assert drop.tolist() == [3, 4, 6] and latents.tolist() == [6, 8, 8]
    Curriculum.latents_follow_steps = False
    assert training_stage(np.array([3]), 4, Curriculum)[1].tolist() == [8], "the stock rule"


def test_coconut_dataset_and_model(tmp_path):
    from backbones.characters import COCONUTTokenizer
    from backbones.lahr import LahrConfig
    from coconut import COCONUTModel

    rows = [{"question": "What is 1 + 2?", "steps": ["1 + 2 = 3.", "It is 3.", "Yes."], "answer": "3"}]
    rows += [{"question": "2?", "steps": ["2."], "answer": "2"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokenizer = COCONUTTokenizer()
    dataset = COCONUTDataset(tmp_path / "rows.json", tokenizer, current_stage=2)
    row = dataset[0]
    bot, eot = (row["input_ids"].tolist().index(i) for i in (2, 4))
    assert row["input_ids"][bot + 1 : eot].tolist() == [3, 3] and row["input_ids"][-1] == 1
    assert (row["labels"][: eot + 1] == -100).all() and (row["labels"][eot + 1 :] == row["input_ids"][eot + 1 :]).all()
    assert "Yes." in tokenizer.decode(row["input_ids"]) and "It is" not in tokenizer.decode(row["input_ids"])
    assert (dataset[1]["input_ids"] == 3).sum() == 1, "no more thoughts than steps"
    dataset.set_stage(0)
    assert "1 + 2 = 3." in tokenizer.decode(dataset[0]["input_ids"]) and (dataset[0]["input_ids"] == 3).sum() == 0
    dataset.set_stage(3)
    assert dataset.eval()[0]["input_ids"][-4:].tolist() == [3, 3, 3, 4] and "labels" not in dataset[0]
    model = COCONUTModel(LahrConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    row = dataset.train()[0]
    ids, labels = (torch.from_numpy(row[key])[None] for key in ("input_ids", "labels"))
    loss = model(ids, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(np.log(100), rel=0.1) and model.gen_forward_cnt == 4
