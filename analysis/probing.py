"""What thoughts tell: linear and non-linear probes for the species of each gold step, at every layer and slot, with controls.

    python -m analysis.probing --checkpoint runs/quickstart/m3_coconut --output_dir results
    python -m analysis.probing --study results/study-quickstart --nonlinear all --grid

Layer 0 is what enters the first block, the last layer the state after the final norm. Slot t is read for gold step t counted
from the start; `from_end` has the steps counted from the end, where 0 is the answer. A cell that fewer than --min_rows rows
have is null. Where thoughts are states, layer 0 of slot t repeats the last layer of the position before it.

Controls: 6 evenly spaced question positions and the model before its training, with the same labels, rows and folds; shuffled
labels (the same estimator on the same folds); rows of equal length; rows in which the step is not the answer.
`controlled_advantage` is the best slot minus the best control in such rows.

Files beside the result: LABEL_probing.states.npz, all states, made again where the checkpoint or the rows are others;
LABEL_probing.cells.jsonl, a line a fitted cell, from which a killed run goes on. Cells are fitted side by side on all cores,
or as many as OMP_NUM_THREADS says.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/probing.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from analysis.command import CheckFailed  # noqa: E402
from analysis.experiment import Experiment, Task  # noqa: E402
from analysis.probe_cells import Cells, Plan  # noqa: E402
from analysis.probe_fields import LEVEL, PAUSES, Found  # noqa: E402
from analysis.probes import LEAST_MEMBERS, synthetic_clusters  # noqa: E402
from analysis.subject import Prompts, Subject  # noqa: E402
from checkpoint import build_model  # noqa: E402
from files import whole_file  # noqa: E402

INPUT_POSITIONS = 6
CLUSTERS_READ = 0.99
STATES_VERSION, CELLS_VERSION = 1, 1
_SPECIES = re.compile(r"(\w+)\s*\.?\s*$")

# ---------------------------------------------------------------- states


def prepare(task: Task) -> dict:
    """{"tables": {source: states [rows, layers + 1, columns, width]}, "lengths": tokens of each prompt}."""
    subject, args = task.subject, task.args
    if not subject.n_thoughts:
        raise ValueError(f"{subject.path}: a checkpoint without thoughts has none to probe")
    cells = (subject.n_layers + 1) * subject.n_thoughts
    if args.shuffles + 1 < cells / LEVEL:
        raise ValueError(
            f"--shuffles {args.shuffles}: p-values below {LEVEL} / {cells} cells need {int(cells / LEVEL)} or more"
        )
    path = task.out / f"{subject.label}_probing.states.npz"
    belongs = {
        "version": STATES_VERSION,
        "checkpoint": subject.sha256,
        "data": task.problems.sha256,
        "rows": len(task.problems),
    }
    tables = None if args.force else read_states(path, belongs)
    prompts = subject.prompts(task.problems)
    if tables is None:
        tables = extract(subject, prompts)
        write_states(path, belongs, tables)
    if not all(np.isfinite(table).all() for table in tables.values()):
        raise CheckFailed(f"{subject.path}: states are not finite")
    lengths = np.array([len(tokens) for tokens in prompts.tokens])
    if subject.model.feedback_mode in PAUSES and not one_vector(tables["slots"][:, 0], lengths):
        raise CheckFailed(f"{subject.path}: layer 0 of a pause slot differs between questions of equal length")
    return {"tables": tables}


def extract(subject: Subject, prompts: Prompts) -> dict[str, np.ndarray]:
    """States at the slots, at evenly spaced positions of the question, and at the slots of the model before its training."""
    n_slots = subject.n_thoughts
    spaced = torch.tensor([question_positions(len(tokens) - n_slots - 2) for tokens in prompts.tokens])
    states = subject.states(prompts, torch.cat([prompts.slots, spaced], 1)).numpy()
    untrained = dataclasses.replace(subject, model=untrained_model(subject))
    return {
        "slots": states[:, :, :n_slots],
        "inputs": states[:, :, n_slots:],
        "untrained": untrained.states(prompts, prompts.slots).numpy(),
    }


def question_positions(n_tokens: int) -> list[int]:
    """6 positions of a question of so many tokens, from its first to its last."""
    return np.linspace(0, n_tokens - 1, INPUT_POSITIONS).round().astype(int).tolist()


def untrained_model(subject: Subject):
    """The model as its training began: pretrained (or seeded random) weights with new rows for the thought tokens."""
    return build_model(subject.config)[0].to(subject.device).eval().requires_grad_(False)


def one_vector(states_NKD: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether layer 0 depends on the number of tokens in front alone, as it must where all thoughts are one vector."""
    return all(np.ptp(states_NKD[lengths == length], axis=0).max() <= 1e-6 for length in np.unique(lengths))


def write_states(path: Path, belongs: dict, tables: dict[str, np.ndarray]) -> None:
    with whole_file(path, "wb") as file:
        rows = np.arange(belongs["rows"])
        np.savez(file, belongs=np.array(json.dumps(belongs)), checkpoint_sha256=belongs["checkpoint"], row_ids=rows, **tables)


def read_states(path: Path, belongs: dict) -> dict[str, np.ndarray] | None:
    """The tables of a file, None where there is none, it is damaged, or it belongs to another checkpoint or other rows."""
    try:
        with np.load(path, allow_pickle=False) as held:
            if json.loads(str(held["belongs"])) != belongs or held["row_ids"].tolist() != list(range(belongs["rows"])):
                return None
            return {name: held[name] for name in ("slots", "inputs", "untrained")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# ---------------------------------------------------------------- rows, then probes


def measure(task: Task, ready: dict, part: str, numbers: list[int]) -> list[dict]:
    """Of each row, what its states may be asked for: the species of its gold steps."""
    return [{"hops": len(task.problems.rows[i]["steps"]), "species": species_of(task.problems.rows[i], i)} for i in numbers]


def species_of(row: dict, i: int = 0) -> list[str]:
    """The species that each step arrives at. Raises ValueError where a step names none."""
    found = [_SPECIES.search(step) for step in row["steps"]]
    if not found or not all(found):
        raise ValueError(f"row {i}: its steps must end in a species (`Every gerpus is a boompus.`), got {row['steps']!r:.80}")
    return [match[1] for match in found]


def summarize(task: Task, ready: dict, records: list[dict]) -> dict:
    subject, args = task.subject, task.args
    clusters = synthetic_clusters()
    if clusters <= CLUSTERS_READ:
        raise CheckFailed(f"the linear probe reads {clusters:.1%} of well-separated clusters, not above {CLUSTERS_READ:.0%}")
    own = [k // max(1, subject.config.c_thought) for k in range(subject.n_thoughts)]
    plan = Plan.of([record["species"] for record in records], own, args.min_rows)
    belongs = [CELLS_VERSION, subject.sha256, task.problems.sha256, len(records), args.alpha, args.shuffles, args.seed]
    identity = hashlib.sha256(json.dumps(belongs).encode()).hexdigest()[:16]
    path = task.out / f"{subject.label}_probing.cells.jsonl"
    if args.force:
        path.unlink(missing_ok=True)
    cells = Cells(ready["tables"], path, identity, args.alpha, args.shuffles, args.seed, title=subject.label)
    return fields(Found(plan, cells), subject.model.feedback_mode, args.nonlinear, args.grid) | {
        "n_excluded": excluded(plan),
        "probe": {
            "penalty": args.alpha if args.alpha is not None else "chosen inside training folds",
            "folds": 5,
            "fold_seed": 42,
            "min_rows": args.min_rows,
            "synthetic_clusters": clusters,
        },
        "states": str(task.out / f"{subject.label}_probing.states.npz"),
    }


def fields(found: Found, mode: str, nonlinear: str = "none", grid: bool = False) -> dict:
    """All fields that follow from the probes. Raises CheckFailed where every cell is exactly a guess among the classes."""
    found.fit()
    made = found.slots() | found.selectivity() | found.controls() | found.advantage()
    read = [(cell["accuracy"], made["n_classes"][cell["slot"]]) for cell in made["cells"]]
    if len(read) > 1 and all(abs(accuracy - 1 / classes) < 1e-9 for accuracy, classes in read):
        raise CheckFailed("all probes are right in exactly 1 / classes of the rows: the states hold nothing")
    return made | {"layer0_at_chance": found.layer0(mode)} | found.nonlinear(nonlinear, grid)


def excluded(plan: Plan) -> dict[str, int]:
    """Rows that have a step and are left out of its probe, by reason."""
    names = {"steps": "step {} from the start", "ends": "step {} from the end", "answerless": "step {}, not the answer"}
    reason = f"species of fewer than {LEAST_MEMBERS} rows"
    return {f"{names[kind].format(t)}: {reason}": rare for (kind, t), (_, rare) in plan.counts.items() if rare}


def verify(results: dict[str, dict]) -> dict:
    """Whether the instrument reads what is there, and nothing where nothing is."""
    return {
        "synthetic_clusters": {label: result["probe"]["synthetic_clusters"] for label, result in results.items()},
        "layer0_at_chance": {label: result["layer0_at_chance"].get("passed") for label, result in results.items()},
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("probes")
    own.add_argument("--alpha", type=float, help="fixed penalty of the ridge (default: chosen inside training folds)")
    own.add_argument("--min_rows", type=int, default=100, help="rows that a cell needs (default: 100)")
    own.add_argument("--shuffles", type=int, default=5000, help="of the labels, for p-values (default: 5000)")
    own.add_argument(
        "--nonlinear",
        choices=("none", "peak", "all"),
        default="peak",
        help="cells that get an MLP: none, the linear peak and its neighbours, all (default: peak)",
    )
    own.add_argument("--grid", action="store_true", help="search 72 settings of the MLP at 5 cells (slow)")


EXPERIMENT = Experiment(
    "probing", ("m3", "m4", "m4b", "m5"), prepare, measure, summarize, __doc__, arguments=arguments, verify=verify, chunk=500
)

if __name__ == "__main__":
    sys.exit(EXPERIMENT.main())
