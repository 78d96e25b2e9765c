"""A checkpoint under study and the problems it is asked: tokens, answers, states.

    subject = Subject.load("runs/quickstart/m3_coconut")        # final epoch; "best", or a number N for checkpoint_N
    problems = Problems.read("data/quickstart/prosqa_test.json", subject.tokenizer, 500)
    prompts = subject.prompts(problems)                         # all thoughts in every row, whatever its number of steps
    records = subject.answers(prompts, edit)                    # greedy answers and two-choice margins, a record a prompt
    states = subject.states(prompts, prompts.slots)             # [P, layers + 1, slots, D]

Shape letters: P prompts, K positions, L layers, D width.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from analysis.interventions import NOWHERE, Recorder
from checkpoint import PHASE1_BEST, PHASE1_EPOCH, find_checkpoint, load_run, numbered_checkpoints
from coconut import Coconut, Rollout, decoder_blocks
from dataset import Lengths, MyCollator, evaluation_latents
from evaluate import evaluate
from files import read_jsonl
from passes import Plan
from tokens import TokenTable, get_dataset, load_rows
from two_choice import has_options, score_options
from utils import Config
from world import World

BATCH_SIZE = {"cpu": 100}  # prompts at a time; elsewhere:
BATCH_SIZE_ELSEWHERE = 512


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problems:
    """The first rows of a data file, tokenised."""

    name: str
    path: Path
    sha256: str
    rows: list[dict]
    table: TokenTable

    @classmethod
    def read(cls, path: str | Path, tokenizer, n: int | None = None, name: str | None = None) -> "Problems":
        """`n` rows at most. Raises ValueError where the file is missing or malformed."""
        path = Path(path)
        rows = load_rows(path, n)
        table = TokenTable(get_dataset(path, tokenizer, n))
        return cls(name or path.stem, path, hashlib.sha256(path.read_bytes()).hexdigest(), rows, table)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hops(self) -> np.ndarray:
        """Number of gold steps of each row, int64 [rows]."""
        return self.table.n_steps(np.arange(len(self)))


class Prompts(Sequence):
    """Token rows ready to be answered. The same problem may stand here many times, to meet different edits.

    `tokens`: one int64 array a prompt; `rows`: the problem of each; `numbers`: its number in the file; `slots`: positions of
    the thoughts, int64 [P, S]. The id of a prompt, which edits see, is its place in this list.
    """

    def __init__(self, tokens: list[np.ndarray], rows: list[dict], numbers: Sequence[int], latent_id: int | None):
        self.tokens, self.rows, self.numbers, self.latent_id = tokens, rows, list(numbers), latent_id

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.tokens[i], "idx": i}

    def take(self, places: Sequence[int]) -> "Prompts":
        """Some of them, in this order, with new ids."""
        picked = ([column[i] for i in places] for column in (self.tokens, self.rows, self.numbers))
        return Prompts(*picked, self.latent_id)

    def times(self, n: int) -> "Prompts":
        """Each prompt n times in a row: prompt p under condition c has the id p * n + c."""
        return self.take([p for p in range(len(self)) for _ in range(n)])

    def followed_by(self, texts: list[Sequence[int]]) -> "Prompts":
        """With further tokens behind each."""
        tokens = [np.concatenate([a, np.asarray(b, dtype=np.int64)]) for a, b in zip(self.tokens, texts)]
        return Prompts(tokens, self.rows, self.numbers, self.latent_id)

    @cached_property
    def slots(self) -> Tensor:
        """Positions of the thought slots, int64 [P, S], NOWHERE where a prompt has fewer than S."""
        found = [np.flatnonzero(x == self.latent_id) if self.latent_id is not None else [] for x in self.tokens]
        return positions(found)

    def lengths(self) -> Lengths:
        total = np.array([len(x) for x in self.tokens])
        latents = (self.slots != NOWHERE).sum(1).numpy()
        return Lengths(total, total, np.zeros_like(total), latents)


def positions(lists: Sequence[Sequence[int]]) -> Tensor:
    """Lists of positions as int64 [P, K], filled up with NOWHERE."""
    table = torch.full((len(lists), max(map(len, lists), default=0)), NOWHERE)
    for row, places in zip(table, lists):
        row[: len(places)] = torch.as_tensor(np.asarray(places, dtype=np.int64))
    return table


# ---------------------------------------------------------------- the checkpoint


@dataclass
class Subject:
    """A trained model with all it knows of itself. `label` is m3, m3-s1, ...: the model's key and its repeat."""

    label: str
    key: str
    repeat: int
    path: Path
    epoch: int | None
    model: Coconut
    tokenizer: object
    ids: object
    config: Config
    batch_size: int = BATCH_SIZE["cpu"]

    @classmethod
    def load(cls, path: str | Path, epoch: str = "final", batch_size: int | None = None, device: str = "auto", **changes):
        """Load a checkpoint file, or of a run folder the `epoch`: final, best (see `best_epoch`), or N for checkpoint_N.

        Raises ValueError naming what is missing.
        """
        path = find_epoch(Path(path), epoch)
        model, tokenizer, ids, config = load_run(path, **changes)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        number, repeat = (
            re.fullmatch(r"(?:checkpoint|epoch)_(\d+)(?:\.pt)?", path.name),
            re.search(r"-s(\d+)$", path.parent.name),
        )
        repeat = int(repeat[1]) if repeat else 0
        label = config.model_key + (f"-s{repeat}" if repeat else "")
        size = batch_size or config.eval_batch_size or BATCH_SIZE.get(device, BATCH_SIZE_ELSEWHERE)
        size = size if batch_size or device == "cpu" else max(size, BATCH_SIZE_ELSEWHERE)
        about = (label, config.model_key, repeat, path, int(number[1]) if number else None)
        return cls(*about, model.to(device).eval().requires_grad_(False), tokenizer, ids, config, size)

    @cached_property
    def sha256(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def n_layers(self) -> int:
        return self.model.base_causallm.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.model.embedding.weight.shape[1]

    @property
    def n_thoughts(self) -> int:
        """Thought slots of every prompt: all of the curriculum's last stage, 0 for models without any."""
        if not self.config.markers:
            return 0
        most = self.config.max_latent_stage
        return int(evaluation_latents(most, most, self.config))

    @property
    def recycles(self) -> bool:
        """Whether thoughts read hidden states, so that replaying and recomputing differ."""
        return self.model.feedback.reads_hidden

    @property
    def recorded(self) -> dict | None:
        """What training recorded of this checkpoint: its validation record in metrics.jsonl."""
        records = [r for r in read_jsonl(self.path.parent / "metrics.jsonl") if r["event"] == "eval"]
        return {r["epoch"]: r for r in records}.get(self.epoch - 1) if self.epoch is not None else None

    # ------------------------------------------------------------ prompts

    def prompts(self, problems: Problems, numbers: Sequence[int] | None = None, n_thoughts=None, markers=None) -> Prompts:
        """Question, and for models with thoughts the markers around `n_thoughts` (default: all) of them.

        `markers=False` leaves the markers out where there are no thoughts. `numbers`: rows of the file (default: all).
        """
        numbers = range(len(problems)) if numbers is None else numbers
        n = self.n_thoughts if n_thoughts is None else n_thoughts
        markers = self.config.markers if markers is None else markers
        if n and not markers:
            raise ValueError(f"{n} thoughts need their markers")
        middle = [self.ids.start, *[self.ids.latent] * n, self.ids.end] if markers else []
        tokens = [np.concatenate([problems.table.question[i], np.array(middle, dtype=np.int64)]) for i in numbers]
        return Prompts(tokens, [problems.rows[i] for i in numbers], numbers, self.model.latent_token_id)

    def own_steps(self, prompts: Prompts) -> list[list[int]]:
        """Tokens of the steps that the model writes itself behind each prompt, up to its answer's `###`."""
        texts = [record["output"] for record in self.answers(prompts)]
        steps = [text.split("#")[0] if "#" in text else text + "\n" for text in texts]
        return [self.tokenizer.encode(text, add_special_tokens=False) if text.strip() else [] for text in steps]

    # ------------------------------------------------------------ answers

    @torch.no_grad()
    def answers(self, prompts: Prompts, edit=None) -> list[dict]:
        """Records of `evaluate.evaluate` (greedy, exact match; two-choice where rows name options), one a prompt."""
        world, new = World(0, 1, self.device), self.config.max_new_tokens or 128
        two_choice = all(map(has_options, prompts.rows))
        sizes = self.batch_size, new
        options = {"two_choice": two_choice, "edit": edit, "quiet": True}
        return evaluate(self.model, prompts, prompts.rows, self.tokenizer, *sizes, world, **options)[0]

    @torch.no_grad()
    def scores(self, prompts: Prompts, edit=None) -> list[dict]:
        """Two-choice scores right behind the prompts, which may hold the model's own steps: see `two_choice.score_options`."""
        order = np.lexsort((prompts.lengths().total,)).tolist()
        found: dict[int, dict] = {}
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            given = [prompts.rows[i] for i in numbers], [prompts[i] for i in numbers], [[]] * len(numbers)
            found |= zip(numbers, score_options(self.model, *given, self.tokenizer, edit))
        return [found[i] for i in range(len(prompts))]

    # ------------------------------------------------------------ states

    @torch.no_grad()
    def rollouts(self, prompts: Prompts, edit=None) -> Iterator[tuple[Plan, Rollout]]:
        """Rollouts over all prompts in batches of like lengths; a plan's passes say by `row_ids` which prompts."""
        order = np.lexsort((prompts.lengths().total,)).tolist()
        collate = MyCollator(self.tokenizer, prompts.latent_id)
        for start in range(0, len(order), self.batch_size):
            batch = collate([prompts[i] for i in order[start : start + self.batch_size]])
            row_ids = batch.pop("idx").tolist()
            plan = self.model.plan(**batch, row_ids=row_ids)
            batch = {key: value.to(self.device) for key, value in batch.items()}
            yield plan, self.model.rollout(**batch, plan=plan, edit=edit)

    def states(self, prompts: Prompts, positions_PK: Tensor, layers: Sequence[int] | None = None, edit=None) -> Tensor:
        """States [P, len(layers), K, D] float32 at positions (zero at NOWHERE); `layers` defaults to 0 .. n_layers.

        Layer 0 is what enters the first block (the input with its position added), layer i < n_layers the output of block
        i, layer n_layers the state after the final norm.
        """
        last = self.n_layers
        layers = tuple(range(last + 1)) if layers is None else tuple(layers)
        recorder = Recorder((0, *range(1, last), last), positions_PK, self.width)
        tap = _Tap(recorder, tuple(i for i in layers if 0 < i < last), edit)
        with _entering_first_block(self.model, tap):
            for plan, rollout in self.rollouts(prompts, tap):
                _take_all(recorder, last, plan, rollout.hidden_BTD)
        return torch.stack([recorder.states[layer] for layer in layers], 1)

    def thoughts(self, prompts: Prompts, edit=None) -> Tensor:
        """What fills the thought slots, float32 [P, S, D]: vectors as fed, without positions."""
        recorder = Recorder((0,), prompts.slots, self.width)
        for plan, rollout in self.rollouts(prompts, edit):
            _take_all(recorder, 0, plan, rollout.inputs_embeds_BTD)
        return recorder.states[0]


def _take_all(recorder: Recorder, layer: int, plan: Plan, x_BTD: Tensor) -> None:
    for pass_ in plan.passes:
        if not pass_.again:
            recorder.take(layer, pass_, x_BTD[:, pass_.start : pass_.stop])


class _Tap:
    """The caller's edit first, the recorder after it; remembers the pass that is running."""

    def __init__(self, recorder: Recorder, blocks: tuple[int, ...], edit):
        self.recorder, self.edit, self.pass_ = recorder, edit, None
        self.layers = tuple({0, *blocks, *(getattr(edit, "layers", (0,)) if edit else ())})

    def __call__(self, layer: int, pass_, x: Tensor) -> Tensor | None:
        self.pass_ = pass_
        changed = self.edit(layer, pass_, x) if self.edit and layer in getattr(self.edit, "layers", (0,)) else None
        if layer > 0:
            self.recorder(layer, pass_, x if changed is None else changed)
        return changed


@contextmanager
def _entering_first_block(model: Coconut, tap: _Tap):
    """Record what enters the first block, where the embeddings have met their positions."""

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        tap.recorder.take(0, tap.pass_, x)

    handle = decoder_blocks(model.base_causallm)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------- which checkpoint


def find_epoch(path: Path, epoch: str = "final") -> Path:
    """The checkpoint file that a path and `final`, `best` or a number name; a file is itself."""
    if path.is_file() or not path.is_dir():
        return find_checkpoint(path)
    numbers, pattern = numbered_checkpoints(path), "checkpoint_{}"
    if not numbers:  # checkpoint_format: phase1
        numbers, pattern = numbered_checkpoints(path, PHASE1_EPOCH), "epoch_{}.pt"
    if numbers and epoch == "best" and (path / PHASE1_BEST).is_file():
        return path / PHASE1_BEST
    if not numbers:
        raise ValueError(f"checkpoint: {path} holds no checkpoint_N; train it first")
    number = numbers[-1] if epoch == "final" else best_epoch(path) if epoch == "best" else int(epoch)
    if number not in numbers:
        raise ValueError(f"epoch: {path} holds no checkpoint_{number}; it has {', '.join(map(str, numbers))}")
    return path / pattern.format(number)


def best_epoch(folder: Path) -> int:
    """The N of the checkpoint with the highest validation accuracy among those trained on the whole curriculum, the earliest
    on ties; a run that has none (chain of thought of few epochs) chooses among all."""
    config = json.loads((folder / "run.json").read_text())["config"]
    kept, first = numbered_checkpoints(folder), config["max_latent_stage"] * config["epochs_per_stage"]
    evals = {r["epoch"]: r["eval/acc"] for r in read_jsonl(folder / "metrics.jsonl") if r["event"] == "eval"}
    evals = {epoch: accuracy for epoch, accuracy in evals.items() if epoch + 1 in kept}
    if not evals:
        raise ValueError(f"epoch: {folder} has no validated checkpoint to choose the best of; give final or a number")
    late = {epoch: accuracy for epoch, accuracy in evals.items() if epoch >= first} or evals
    return 1 + max(late, key=lambda epoch: (late[epoch], -epoch))
