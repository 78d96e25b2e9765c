"""Evaluations on test sets as they lie in run folders: which row of Table 1 each is, and whether it may be called latent.

    for file in find_evaluations([Path("runs")]):
        evaluation = read_evaluation(file)         # of runs/gsm/gsm-coconut-eval/eval_gsm_test.jsonl
        evaluation.row, evaluation.correct, evaluation.n, evaluation.gen_tokens, evaluation.hybrid

`run.py` with `only_eval` leaves the records, eval_<file>.jsonl, and what they are of, eval_<file>.json. Rows are told apart by
the config of the training run, which lies beside the checkpoint. A model that is to answer without a chain, and still writes
one, is a hybrid: its accuracy is not that of its row (arXiv 2412.06769, Table 1).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from checkpoint import NUMBERED
from dataset import extract_steps
from files import read_json, read_jsonl
from utils import Config, check_config

TASKS = {"gsm": "GSM8K", "prontoqa": "ProntoQA", "prosqa": "ProsQA", "arith_gsm": "the stand-in for GSM8K"}
TEST_ROWS = {"gsm": 1319, "prontoqa": 800, "prosqa": 500}
RECORDS = re.compile(rf"eval_({'|'.join(TASKS)})_test\.jsonl")
THOUGHTS = {"gsm": 2, "prontoqa": 1, "prosqa": 1}  # a step, in the paper's runs
ROWS = {
    "cot": "CoT",
    "no_cot": "No-CoT",
    "icot": "iCoT",
    "pause_token": "Pause token",
    "coconut": "Coconut",
    "wo_curriculum": "w/o curriculum",
    "wo_thought": "w/o thought",
    "pause_as_thought": "Pause as thought",
}
COUNTED = ("coconut", "wo_curriculum")  # rows whose latents count as new tokens; pause tokens do not
CURRICULUM = ("coconut", "wo_thought", "pause_as_thought")
HYBRID_SHARE = 0.01  # of the outputs, with text before the answer, from which on a checkpoint is a hybrid


def row_of(config: Config) -> str | None:
    """The row of Table 1 that a training config belongs to; None for what the table does not have (other feedback modes)."""
    if config.icot or config.cot or config.no_cot:
        return "icot" if config.icot else "cot" if config.cot else "no_cot"
    if config.no_thoughts:
        return "wo_thought"
    if config.feedback_mode != "continuous":
        return None
    last_stage_only = config.epochs_per_stage == 1 and config.resume > config.max_latent_stage
    if config.coconut:
        return "wo_curriculum" if last_stage_only else "coconut"
    return "pause_token" if last_stage_only else "pause_as_thought"


def is_last_stage(config: Config, epoch: int) -> bool:
    """Whether nothing of the chain is left in an epoch (index) of this run; always for those that have no curriculum."""
    if config.icot:
        return config.stage(epoch) >= config.icot_remove_all_beyond
    return config.cot or config.no_cot or config.stage(epoch) > config.max_latent_stage


def writes_steps(record: dict) -> bool:
    """Whether an output has text before its answer."""
    return bool(extract_steps(record["output"])) or "<<" in record["output"]


def share_with_steps(records: list[dict]) -> float:
    """The fraction of outputs with text before the answer."""
    return sum(map(writes_steps, records)) / len(records)


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one test set. `trained`: the training run's config; `asked`: the evaluation's, where it is known."""

    file: Path
    task: str
    row: str | None
    trained: Config
    asked: Config | None
    checkpoint: str | None
    effective_batch: int | None
    records: list[dict]

    @property
    def name(self) -> str:
        """How the row is called; a hybrid never bears its row's name alone."""
        return ROWS[self.row] + (", hybrid" if self.hybrid else "")

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def correct(self) -> int:
        return sum(record["correct"] for record in self.records)

    @property
    def latents(self) -> float:
        """Latents a question, or pause tokens."""
        return sum(record["n_latents"] for record in self.records) / self.n

    @property
    def gen_tokens(self) -> float:
        """New tokens a question without EOS, as the paper counts: latents count, pause tokens do not."""
        total = sum(record["generated_tokens"] for record in self.records) / self.n
        return total if self.row in COUNTED else total - self.latents

    @property
    def gen_tokens_eos(self) -> float:
        """The same with the EOS of those answers that came to their end."""
        config, path = self.asked or self.trained, self.asked.val_path if self.asked else self.task
        limit = config.max_new_tokens or (64 if "gsm" in path else 128)  # as in evaluate.validate
        ended = sum(record["generated_tokens"] - record["n_latents"] < limit for record in self.records)
        return self.gen_tokens + ended / self.n

    @cached_property
    def steps_share(self) -> float | None:
        """The fraction of outputs with text before the answer; None for CoT, which is to write it."""
        return None if self.row == "cot" else share_with_steps(self.records)

    @cached_property
    def hybrid(self) -> str | None:
        """Why this must not be called by its row's name, or None."""
        if self.steps_share and self.steps_share > HYBRID_SHARE:
            return f"{100 * self.steps_share:.1f} % of outputs write steps before the answer"
        found = NUMBERED.fullmatch(Path(self.checkpoint or "").name)
        if found and not is_last_stage(self.trained, int(found[1]) - 1):
            return f"{found[0]} is of stage {self.trained.stage(int(found[1]) - 1)}, in which chains are still trained"
        return None

    @property
    def variant(self) -> tuple[str, ...]:
        """In what the training run departs from the row of the paper, as far as it is recorded (of the stand-in: its rows)."""
        config, found = self.trained, []
        if config.max_train_samples:
            found.append(f"{config.max_train_samples:,} training rows")
        if self.task not in THOUGHTS:
            return tuple(found)
        if Path(config.model_id).name != "gpt2" or config.from_scratch:
            found.append(f"{config.model_id}{' from scratch' if config.from_scratch else ''}")
        if self.row in (*COUNTED, "pause_token", "pause_as_thought") and config.c_thought != THOUGHTS[self.task]:
            found.append(f"c = {config.c_thought}")
        if self.effective_batch not in (None, 128) and self.row != "icot":
            found.append(f"effective batch {self.effective_batch}")
        others = {key: getattr(config, key) for key in ("latent_iterations", "uniform_prob", "lora")}
        found += [f"{key} = {value}" for key, value in others.items() if value]
        return tuple(found)

    @property
    def remarks(self) -> list[str]:
        """What a reader must know beside the accuracy."""
        found = [*self.variant] + ([self.hybrid] if self.hybrid else [])
        if self.steps_share and not self.hybrid:
            found.append(f"{100 * self.steps_share:.1f} % of outputs write steps")
        if self.n != TEST_ROWS.get(self.task, self.n):
            found.append(f"{self.n:,} of {TEST_ROWS[self.task]:,} test rows")
        asked = self.trained.max_latent_stage * self.trained.c_thought
        if self.trained.markers and abs(self.latents - asked) > 1e-9:
            found.append(f"{self.latents:.1f} latents a question, the last stage has {asked}: wrong resume?")
        return found


# ---------------------------------------------------------------- reading


def find_evaluations(roots: Iterable[Path]) -> list[Path]:
    """The records of every evaluation on a test set in or below some folders. ValueError for a folder that is not there."""
    files = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; name run folders, or folders of them")
        files |= {path.resolve(): path for path in sorted(root.rglob("eval_*_test.jsonl")) if RECORDS.fullmatch(path.name)}
    return list(files.values())


def read_evaluation(file: Path) -> Evaluation:
    """The evaluation whose records a file holds. ValueError where it is empty, or nothing says which run it is of."""
    side = file.with_suffix(".json")
    about = read_json(side, "checkpoint", "config") if side.is_file() else {"checkpoint": None, "config": None}
    asked = about["config"] and check_config(about["config"], str(side))
    folders = [file.parent, file.parent.with_name(file.parent.name.removesuffix("-eval"))]
    if about["checkpoint"]:
        folders.insert(0, Path(about["checkpoint"]).parent)
    run = next((folder / "run.json" for folder in folders if (folder / "run.json").is_file()), None)
    facts = read_json(run, "config") if run else {}
    trained = check_config(facts["config"], str(run)) if run else asked
    if trained is None:
        raise ValueError(f"{file.parent} has neither run.json nor {side.name}, which say what was evaluated; evaluate it again")
    records = read_jsonl(file, "correct", "output", "n_latents", "generated_tokens")
    if not records:
        raise ValueError(f"{file} holds no records; evaluate it again")
    micro = facts.get("micro_batches_per_update")
    batch = micro and micro * facts["config"]["batch_size_training"]
    task = RECORDS.fullmatch(file.name)[1]
    return Evaluation(file, task, row_of(trained), trained, asked, about["checkpoint"], batch, records)
