"""The health command: green on real checkpoints of every backbone, red on a run whose records or weights stand still."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from health_material import TRAINED, examined, results, trained

from analysis import health
from analysis.health_checks import CHECKS
from analysis.health_gradients import allowed
from analysis.health_patient import Patient
from analysis.health_routing import routing_report
from analysis.health_words import answers, encoded, limits, longest_run, statistics
from backbones import load_tokenizer
from backbones.cognate import CognateConfig
from backbones.lahr import LahrConfig
from files import read_jsonl

RUN = "learning_rate,weights_move,validation,disjoint"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, own_cache):
    return trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(folders, tmp_path):
    """copy("lahr"): a run folder of its own, to be damaged."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


# ---------------------------------------------------------------- green


@pytest.mark.parametrize("model", ["lahr", "cognate", "gpt2"])
def test_a_real_checkpoint_is_green(folders, capsys, model):
    assert health.main(["--checkpoint", str(folders[model]), "--num_samples", "12"]) == 0
    said, shown = json.loads((folders[model] / "health.json").read_text()), capsys.readouterr().out
    checks = results(said)
    assert said["healthy"] and said["failed"] == [] and said["backbone"] == model and said["updates"] == 6
    assert {name.split(".")[0].split("_")[0] for name in checks} == {name.split("_")[0] for name in CHECKS}
    judged = {name for name, check in checks.items() if check["status"] == "ok"}
    own = {
        "lahr": {"router_gradient", "routing_padding", "memory.layer_2"},
        "cognate": {"halting_gradient", "memory"},
        "gpt2": set(),
    }
    everywhere = {"causality", "repeat", "permutation", "batch_size", "padding", "state", "cached", "loss", "training_targets"}
    everywhere |= {"prefixes", "gradients", *RUN.split(",")}
    assert judged == everywhere | own.get(model, set())
    assert all(check["detail"] for check in said["checks"] if check["status"] == "not applicable")
    assert all(check["name"] in shown for check in said["checks"]) and "untrained: 6 updates" in shown
    assert [question["prompt"][-2:] for question in said["questions"]] == ["A:"] * 3 and len(said["outputs"]) == 3


def test_the_function_is_checked_to_float64_and_the_model_left_in_float32(folders):
    patient = Patient.load(folders["lahr"], n_rows=12)
    before = {name: x.clone() for name, x in patient.model.state_dict().items()}
    for name in ("causality", "batch_size", "padding", "cached", "training_targets", "gradients"):
        result = CHECKS[name](patient)[0]
        assert result.ok and result.value < 1e-9
    after = patient.model.state_dict()
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())
    assert not patient.model.training and all(p.grad is None for p in patient.model.parameters())
    assert not any(router._pending for router in patient.bare.model.routers.values()), "scores of a trial were kept"


def test_without_data_rows_are_random_and_say_so(copy):
    folder = copy("gpt2")
    for name in ("state_2", "run.json"):
        said = json.loads((folder / name).read_text())
        said["config"] |= {"val_path": "gone/cot_val.json", "train_path": "gone/cot.json"}
        (folder / name).write_text(json.dumps(said))
    code, said = examined(folder, None, "causality,cached,gradients,echo,variety,disjoint", *TRAINED)
    checks = results(said)
    assert code == 0 and said["rows"] == "random token ids (gone/cot_val.json and gone/cot.json not found)"
    assert {name for name, check in checks.items() if check["status"] == "ok"} == {"causality", "cached", "gradients"}
    assert "random token ids" in checks["echo"]["detail"] and "gone/cot.json" in checks["disjoint"]["detail"]


def test_mistakes_are_one_line_and_exit_code_2(folders, tmp_path, capsys):
    folder = str(folders["gpt2"])
    (tmp_path / "empty").mkdir()
    for call, word in (
        (["--checkpoint", str(tmp_path / "none")], "no checkpoint at"),
        (["--checkpoint", str(tmp_path / "empty")], "no checkpoint at"),
        (["--checkpoint", folder, "--only", "causalty"], "did you mean causality?"),
        (["--checkpoint", folder, "--data", "gone.json"], "gone.json does not exist"),
        (["--checkpoint", folder, "--num_samples", "1"], "at least 2 rows"),
        *([] if torch.cuda.is_available() else [(["--checkpoint", folder, "--device", "cuda"], "cuda is not available")]),
        (["--checkpoint", folder, "--only", "loss", "--output", str(tmp_path / "no/such/folder.json")], "cannot write"),
    ):
        assert health.main(call) == 2
        errors = capsys.readouterr().err.splitlines()
        assert [word in line for line in errors if line.startswith("error: ")] == [True], errors


def test_a_model_that_breaks_fails_and_the_rest_goes_on(folders):
    def broken(patient):
        patient.model.extend = None
        patient.model.extend = lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3)

    code, said = examined(folders["gpt2"], broken, "cached,loss")
    assert code == 1 and said["failed"] == ["cached"] and "RuntimeError" in results(said)["cached"]["detail"]
    assert results(said)["loss"]["status"] == "ok"


# ---------------------------------------------------------------- the run


def rewritten(folder, change) -> None:
    records = read_jsonl(folder / "metrics.jsonl")
    for record in records:
        change(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_rate_that_never_reaches_the_optimizer(copy):
    folder = copy("gpt2")
    rewritten(folder, lambda r: r.update(lr=1e-3) if r["event"] == "step" else None)
    code, said = examined(folder, None, RUN)
    assert code == 1 and said["failed"] == ["learning_rate"] and results(said)["learning_rate"]["value"] == 1
    rewritten(folder, lambda r: r.update(lr=3e-4 / (1 + r["train/step"])) if r["event"] == "step" else None)
    _, said = examined(folder, None, RUN)
    assert said["failed"] == ["learning_rate"] and "off the schedule" in results(said)["learning_rate"]["detail"]
    rewritten(folder, lambda r: r.update(lr=0.0) if r["event"] == "step" else None)
    assert examined(folder, None, RUN)[1]["failed"] == ["learning_rate"]


def test_weights_that_do_not_move(copy):
    folder = copy("lahr")
    weights = torch.load(folder / "checkpoint_2", weights_only=True)
    before = torch.load(folder / "checkpoint_1", weights_only=True)
    name = next(name for name in weights if "sub_keys" in name)
    torch.save(weights | {name: before[name]}, folder / "checkpoint_2")
    code, said = examined(folder, None, RUN)
    assert code == 1 and said["failed"] == ["weights_move"] and name in results(said)["weights_move"]["detail"]
    torch.save(before, folder / "checkpoint_2")
    found = results(examined(folder, None, RUN)[1])["weights_move"]
    assert (found["value"], found["status"]) == (0.0, "FAIL")


@pytest.mark.parametrize("model", ["lahr", "gpt2"])
def test_the_first_checkpoint_is_compared_with_the_start_of_training(folders, model):
    patient = Patient.load(folders[model] / "checkpoint_1", n_rows=4)
    (result,) = CHECKS["weights_move"](patient)
    assert result.ok and "the start of training" in result.detail and 1e-4 < result.value < 0.2


@pytest.mark.parametrize(
    "change, word",
    [
        ({"eval/loss": 3.14159}, "3.1416 twice"),
        ({"eval/loss": math.nan}, "loss nan"),
        ({"eval/perplexity": 12.2}, "perplexity 12.2"),
    ],
)
def test_validations_that_are_not_real(copy, change, word):
    folder = copy("gpt2")
    rewritten(folder, lambda r: r.update(change) if r["event"] == "eval" else None)
    code, said = examined(folder, None, RUN)
    assert code == 1 and said["failed"] == ["validation"] and word in results(said)["validation"]["detail"]
    rewritten(folder, lambda r: r.update({"eval/perplexity": math.exp(r["eval/loss"])}) if r["event"] == "eval" else None)
    assert word.startswith("perplexity") == (examined(folder, None, RUN)[0] == 0)


def test_validation_rows_that_were_trained_on(copy, tmp_path):
    folder = copy("gpt2")
    said = json.loads((folder / "state_2").read_text())
    train, val = (json.loads(open(said["config"][key]).read()) for key in ("train_path", "val_path"))
    (tmp_path / "mixed.json").write_text(json.dumps([*val[:-3], *train[:3]]))
    said["config"]["val_path"] = str(tmp_path / "mixed.json")
    (folder / "state_2").write_text(json.dumps(said))
    code, said = examined(folder, None, RUN)
    assert code == 1 and said["failed"] == ["disjoint"] and results(said)["disjoint"]["value"] == 3


def test_a_file_without_its_run_has_no_rates(copy, tmp_path):
    folder = copy("gpt2")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("checkpoint_2", "state_2"):
        shutil.copy(folder / name, alone / name)
    code, said = examined(alone, None, RUN)
    statuses = {name: check["status"] for name, check in results(said).items()}
    assert code == 0 and statuses == dict.fromkeys(RUN.split(","), "not applicable") | {"disjoint": "ok"}


# ---------------------------------------------------------------- parts


def test_rates_of_routing_by_kind_of_token(folders):
    """Thoughts are always selected and nothing else is: counted by hand in the same batches."""
    patient = Patient.load(folders["lahr"], n_rows=12)
    patient.bare.config.mod_force_thoughts = True
    for router in patient.bare.model.routers.values():
        router.threshold.fill_(1e9)
    batches = list(patient.batches(patient.thinking))
    rates = routing_report(patient.model, batches)
    n_thoughts = sum(int((batch["input_ids"] == patient.model.latent_token_id).sum()) for batch in batches)
    n_real, n_text = (
        sum(int((batch[key] != gap).sum()) for batch in batches) for key, gap in (("attention_mask", 0), ("labels", -100))
    )
    assert rates["rates"]["thought"] == [1.0, 1.0] and rates["layers"] == [1, 3] and rates["capacity"] == 0.5
    assert rates["rates"]["question"] == rates["rates"]["text"] == [0.0, 0.0] and rates["padding"] == 0
    assert rates["rates"]["all"] == [n_thoughts / n_real] * 2 and 0 < n_thoughts < n_real
    n = {"question": n_real - n_text - n_thoughts, "thought": n_thoughts, "text": n_text, "all": n_real}
    assert {kind: rates["n"][kind] for kind in n} == n
    assert routing_report(Patient.load(folders["gpt2"], n_rows=4).model, batches[:1]) is None


def test_what_the_data_say_meets_its_own_limits(folders):
    """Characters repeat and answers begin alike: no limit may fail a model for saying exactly what it was taught."""
    gold = Patient.load(folders["gpt2"], n_rows=12).gold
    for outputs in (gold, [row[:1] * 3 + row[1:] for row in gold], [[7, 8, 9], [7, 5, 9], [7, 8, 5]] * 4, [[1, 1, 1]] * 8):
        ends = [3] * len(outputs)
        own = statistics(outputs, ends)
        for name, (sign, limit) in limits(own).items():
            assert {"<": own[name] < limit, ">": own[name] > limit, ">=": own[name] >= limit}[sign], (name, own[name], limit)
    varied = statistics([[i, i + 1, i + 2, i + 3] for i in range(10)], [99] * 10)
    published = {"top_share": ("<", 0.4), "distinct_first": (">=", 3), "longest_run": ("<", 6), "distinct_1": (">", 0.2)}
    assert limits(varied) == published | {"echo": ("<", 0.5)}


def test_statistics_of_text():
    found = statistics([[5, 5, 5, 2], [3, 2], []], [5, 1, 7])
    assert found == {"top_share": 0.5, "distinct_first": 2, "longest_run": 3, "distinct_1": 0.5, "echo": 1 / 3}
    assert longest_run([]) == 0 and longest_run([1, 2, 2, 1, 1, 1]) == 3


def test_a_right_answer_is_what_a_text_comes_to():
    said = {
        "15 - 7 = 8.": True,
        " 8 apples are left ### 9": False,
        "15 - 7 ### 8": True,
        "3 is is 1 8 = 1. To": False,
        "": False,
    }
    assert {text: answers(text, "8") for text in said} == said
    assert answers(" It is Paris.", "Paris") and not answers("Parisian", "Paris")


def test_a_tokenizer_that_lacks_characters(own_cache):
    characters, words = (load_tokenizer(f"backbones/{name}") for name in ("characters", "prosqa_tiny"))
    assert len(encoded(characters, "Q: 25 + 17?\nA:")) == 14 and encoded(characters, "2 × 2") is None
    assert encoded(words, "Q: 25 + 17?\nA:") is None and encoded(words, "Is Alex a bompus or brimpus?") is not None


def test_gradients_that_may_be_zero():
    assert not [why for pattern, why in allowed(LahrConfig()).items() if "memory" in pattern]
    assert [p for p in allowed(LahrConfig(memory_topk=1)) if "sub_keys" in p]
    for options, idle in (
        ({}, False),
        ({"use_act": False}, True),
        ({"max_recursions": 1}, True),
        ({"max_recursions": 0}, True),
    ):
        assert any("act_head" in p for p in allowed(CognateConfig(**options))) is idle
    assert not any("act_head" in p for p in allowed(CognateConfig(max_recursions=1, act_loss="bce")))


def test_rows_are_those_of_training(folders):
    patient = Patient.load(folders["cognate"], n_rows=12)
    assert patient.stage == 1 and len(patient.rows) == len(patient.prompts) == 12
    for row, prompt, gold in zip(patient.rows, patient.prompts, patient.gold):
        n = len(prompt["input_ids"])
        assert np.array_equal(row["input_ids"][:n], prompt["input_ids"]) and row["input_ids"][n:-1].tolist() == gold
        assert (row["labels"][:n] == -100).all() and (row["labels"][n:] == row["input_ids"][n:]).all()
        assert (prompt["input_ids"] == patient.model.latent_token_id).sum() == 1
