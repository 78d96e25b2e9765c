"""Causal tracing (Meng et al. 2022, arXiv 2202.05262): which state brings the answer back when it alone is put back.

    traced = rows_to_trace(subject, problems, 200)                        # rows answered right
    group = Group.of("thoughts", traced.asked, {"slot": slots}, max_positions=20)
    group.noise_std = own_std(subject, group)
    records = trace(subject, group, [0, 1, 2], seed)                      # by place among the rows traced; see effects.py

Runs of a row are compared by its two-choice margin, log P(target) - log P(wrong) over the options' whole strings behind
`### Name is a`, in nats; the name is never scored. Clean: as it is. Corrupted: the inputs of all positions of a group are
noise. Restored: corrupted, with the clean state put back at one (layer, position), or at several positions of one layer.

Layer 0 is the input as fed, layer i the raw output of block i (never the state after the final norm). A state of the last
layer reaches nothing but its own position's prediction and, where thoughts read states, the thought behind it: elsewhere its
effect is 0 by construction.

Shape letters: R rows, K positions of a group, P restored positions (bins), I prompts of one call, B C a batch, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from analysis.command import CheckFailed
from analysis.interventions import NOWHERE, Patch, Recorder, chain, gaussian
from analysis.self_checks import TOLERANCE
from analysis.subject import Problems, Prompts, Subject, positions
from dataset import MyCollator
from generation import Decoding
from two_choice import Options, has_options

LOOKED_AT = 100  # rows answered at a time, and rows that noise is calibrated on


# ---------------------------------------------------------------- what is asked


@dataclass
class Asked:
    """Prompts that end with `### Name is a`, so that edits can aim at these tokens, too, and what may stand behind them: the
    pieces of the right and of the wrong option."""

    prompts: Prompts
    tails: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, subject: Subject, prompts: Prompts) -> "Asked":
        """Put `### Name is a` behind prompts that end with thoughts or the model's own steps."""
        options = [Options.of(row, [], 0, subject.model, subject.tokenizer) for row in prompts.rows]
        tails = [tuple(answer[o.n_name :] for answer in o.answers) for o in options]
        return cls(prompts.followed_by([o.answers[0][: o.n_name] for o in options]), tails)

    def take(self, rows: Sequence[int]) -> "Asked":
        """Some of them, in this order, with new ids."""
        return Asked(self.prompts.take(rows), [self.tails[i] for i in rows])

    @torch.no_grad()
    def margins(self, subject: Subject, edit=None) -> np.ndarray:
        """log P(right option) - log P(wrong option) of each prompt, float64 [I], in nats; `edit` sees the prompts."""
        model, collate = subject.model, MyCollator(subject.tokenizer, self.prompts.latent_id, left=True)
        order = np.lexsort((self.prompts.lengths().total,)).tolist()
        logp_I2 = torch.zeros(len(order), 2, dtype=torch.float64)
        for start in range(0, len(order), subject.batch_size):
            ids = order[start : start + subject.batch_size]
            batch = collate([self.prompts[i] for i in ids])
            batch["row_ids"] = batch.pop("idx").tolist()
            decoding = None
            for choice in (0, 1):
                tails = [self.tails[i][choice] for i in ids]
                if decoding is None or not decoding.movable:
                    room = max(len(tail) for i in ids for tail in self.tails[i])
                    decoding = Decoding.prefill(model, **batch, max_new_tokens=0, room=room, edit=edit)[0]
                hidden_BCD = torch.cat([decoding.state_BD[:, None], decoding.states_behind(tails)], 1)
                labels_BC = torch.full(hidden_BCD.shape[:2], -100)
                for labels_C, tail in zip(labels_BC, tails):
                    labels_C[1 : 1 + len(tail)] = torch.tensor(tail)
                loss_N, row_N = model.label_losses(hidden_BCD, labels_BC.to(hidden_BCD.device))
                logp_I2[:, choice].index_add_(0, torch.tensor(ids)[row_N.cpu()], -loss_N.cpu().double())
        return (logp_I2[:, 0] - logp_I2[:, 1]).numpy()


# ---------------------------------------------------------------- rows


@dataclass
class Traced:
    """The rows to trace. `steps`, `prefix`: positions of the model's own steps and of `### Name is a`; `status`: what became of
    each row of the file, traced, wrong_answer, skipped_... with the reason, or not_reached."""

    asked: Asked
    steps: list[list[int]]
    prefix: list[list[int]]
    status: dict[int, str]

    def counts(self) -> dict:
        """n, n_excluded {reason: rows}, n_traced, n_skipped, n_wrong_answer."""
        found = {name: list(self.status.values()).count(name) for name in dict.fromkeys(self.status.values())}
        n = found.pop("traced", 0)
        return {
            "n": n,
            "n_excluded": found,
            "n_traced": n,
            "n_skipped": sum(rows for name, rows in found.items() if name.startswith("skipped")),
            "n_wrong_answer": found.get("wrong_answer", 0),
        }


def rows_to_trace(subject: Subject, problems: Problems, wanted: int) -> Traced:
    """The first `wanted` rows that are answered right, m1's behind its own steps.

    Raises CheckFailed where their margins are not those of `Subject.scores`.
    """
    status = dict.fromkeys(range(len(problems)), "not_reached")
    tokens, steps, numbers = [], [], []
    for start in range(0, len(problems), LOOKED_AT):
        if len(numbers) == wanted:
            break
        prompts = subject.prompts(problems, range(start, min(start + LOOKED_AT, len(problems))))
        correct = [record["correct"] for record in subject.answers(prompts)]
        own = [[]] * len(prompts)
        if subject.key == "m1":
            right = [i for i, is_right in enumerate(correct) if is_right]
            said = dict(zip(right, subject.own_steps(prompts.take(right))))
            own = [said.get(i, []) for i in range(len(prompts))]
        for row, number, question, is_right, said in zip(prompts.rows, prompts.numbers, prompts.tokens, correct, own):
            if len(numbers) == wanted:
                break
            whole = np.concatenate([question, np.array(said, dtype=np.int64)])
            status[number] = _status(subject, row, whole, said) if is_right else "wrong_answer"
            if status[number] == "traced":
                tokens.append(whole)
                steps.append(list(range(len(question), len(whole))))
                numbers.append(number)
    prompts = Prompts(tokens, [problems.rows[i] for i in numbers], numbers, subject.model.latent_token_id)
    asked = Asked.of(subject, prompts)
    _check_margins(subject, prompts, asked)
    prefix = [list(range(len(x), len(y))) for x, y in zip(tokens, asked.prompts.tokens)]
    return Traced(asked, steps, prefix, status)


def _status(subject: Subject, row: dict, tokens: np.ndarray, steps: list[int]) -> str:
    """`traced`, or why a row that is answered right is skipped."""
    if not has_options(row):
        return "skipped_no_options"
    if subject.key == "m1" and not steps:
        return "skipped_no_steps"
    fits = Options.of(row, [], len(tokens), subject.model, subject.tokenizer) is not None
    return "traced" if fits else "skipped_too_long"


def _check_margins(subject: Subject, prompts: Prompts, asked: Asked) -> None:
    few = range(min(LOOKED_AT, len(prompts)))
    theirs = [record["margin"] for record in subject.scores(prompts.take(few))]
    away = np.abs(asked.take(few).margins(subject) - theirs)
    if not (away <= TOLERANCE).all():
        raise CheckFailed(f"two ways to score one margin differ by {away.max():.4g} nats")


# ---------------------------------------------------------------- a group of positions


@dataclass
class Group:
    """Positions that are corrupted together, in named parts, and those of them that are restored one by one.

    `bin_RP` says which of a row's K positions stands in bin p (NOWHERE: none): bins are shared out among the parts, and a part
    longer than its share is thinned evenly, so that bin p means the same in all rows. `extras` names further edited runs.
    """

    name: str
    asked: Asked
    place_RK: Tensor
    part_RK: Tensor  # number of the part, NOWHERE where a row has fewer than K positions
    bin_RP: Tensor
    names: list[str]  # of the parts
    labels: list[tuple[str, int]]  # of the bins: part, place in it
    extras: Callable[["Chunk"], dict[str, object]] = lambda chunk: {}
    noise_std: float = 1.0
    trial: int = 0  # groups differ in their draws

    @classmethod
    def of(cls, name: str, asked: Asked, parts: dict[str, list[list[int]]], max_positions: int, **options) -> "Group":
        """`parts`: {part: positions in each prompt}; parts that no prompt has are left out."""
        parts = {part: rows for part, rows in parts.items() if any(rows)}
        share = shares({part: max(map(len, rows)) for part, rows in parts.items()}, max_positions)
        n, bins = len(asked.prompts), []
        for row in range(n):
            start, found = 0, []
            for part, rows in parts.items():
                picked = thin(len(rows[row]), share[part])
                found += [*(start + picked), *[NOWHERE] * (share[part] - len(picked))]
                start += len(rows[row])
            bins.append(found)
        place = positions([[x for rows in parts.values() for x in rows[i]] for i in range(n)])
        number = positions([[j for j, rows in enumerate(parts.values()) for _ in rows[i]] for i in range(n)])
        labels = [(part, i) for part in parts for i in range(share[part])]
        bin_RP = torch.tensor(bins, dtype=torch.long).reshape(n, len(labels))
        return cls(name, asked, place, number, bin_RP, list(parts), labels, **options)

    def take(self, rows: Sequence[int]) -> "Group":
        """Some of its rows."""
        rows = list(rows)
        tables = {name: getattr(self, name)[rows] for name in ("place_RK", "part_RK", "bin_RP")}
        return replace(self, asked=self.asked.take(rows), **tables)


def thin(n: int, most: int) -> np.ndarray:
    """At most `most` of 0 .. n-1, evenly spaced, the first and the last among them."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).round().astype(int)


def shares(needs: dict[str, int], most: int) -> dict[str, int]:
    """Share out `most` places: small parts get what they need, and the others divide evenly what is left."""
    given = {}
    for left, part in zip(range(len(needs), 0, -1), sorted(needs, key=needs.get)):
        given[part] = min(needs[part], (most - sum(given.values())) // left)
    return given


def own_std(subject: Subject, group: Group) -> float:
    """Standard deviation of all entries of the group's clean inputs, over its first rows; 0 where it has none."""
    few = group.take(range(min(LOOKED_AT, len(group.asked.prompts))))
    recorder = Recorder((0,), few.place_RK, subject.width)
    for _ in subject.rollouts(few.asked.prompts, recorder):
        pass
    entries = recorder.states[0][few.place_RK != NOWHERE]
    return float(entries.std()) if entries.numel() else 0.0


# ---------------------------------------------------------------- the runs


@dataclass
class Chunk:
    """Rows of a group on their way through the model: clean states by layer, each [R, K, D], and noise of the same shape."""

    subject: Subject
    group: Group
    states: dict[int, Tensor]
    noise_RKD: Tensor

    def corrupt(self, which_RK: Tensor) -> Patch:
        """Noise at some positions."""
        return Patch(0, torch.where(which_RK, self.group.place_RK, NOWHERE), self.noise_RKD)

    def restore(self, layer: int, row_I: Tensor, which_IK: Tensor) -> tuple[Patch, Patch]:
        """For prompts that stand for rows `row_I`: noise everywhere, then clean states of a layer where `which_IK` says."""
        place_IK = self.group.place_RK[row_I]
        noise = Patch(0, place_IK, _OfRows(self.noise_RKD, row_I))
        return noise, Patch(layer, torch.where(which_IK, place_IK, NOWHERE), _OfRows(self.states[layer], row_I))


class _OfRows:
    """Vectors of rows [R, K, D] as if each of the prompts [I] that repeat them had its own: what `Patch` looks up."""

    def __init__(self, values_RKD: Tensor, row_I: Tensor):
        self.values_RKD, self.row_I, self.shape = values_RKD, row_I, (len(row_I), *values_RKD.shape[1:])

    def __getitem__(self, where) -> Tensor:
        i, k = where
        return self.values_RKD[self.row_I[i], k]


def trace(subject: Subject, group: Group, rows: Sequence[int], seed: int) -> list[dict]:
    """Margins in nats of all runs of some rows of a group, a record a row.

    clean, corrupted (all positions), extras {name: margin}, n_positions; restored, a curve over layers 0 .. n for each bin
    (None where it is empty), all and none (curves of what is restored together), and where there are several parts, parts
    {name: {"corrupted": it alone, "restored": a curve}}. Raises CheckFailed where an edit misses states it aims at.
    """
    group = group.take(rows)
    used_RK, asked = group.place_RK != NOWHERE, group.asked
    recorder = Recorder(range(subject.n_layers + 1), group.place_RK, subject.width, subject.model.embedding.weight.dtype)
    clean = asked.margins(subject, recorder)
    noise_RKD = group.noise_std * gaussian(seed, asked.prompts.numbers, used_RK.shape[1], subject.width, group.trial)
    chunk = Chunk(subject, group, recorder.states, noise_RKD)
    several = {name: group.part_RK == j for j, name in enumerate(group.names)} if len(group.names) > 1 else {}
    edits = {"all": chunk.corrupt(used_RK), **{name: chunk.corrupt(which_RK) for name, which_RK in several.items()}}
    corrupted = {name: asked.margins(subject, edit) for name, edit in edits.items()}
    extras = {name: asked.margins(subject, edit) for name, edit in group.extras(chunk).items()}
    conditions = _conditions(group, used_RK, several)
    row_I, which_IK = torch.tensor([row for row, _, _ in conditions]), torch.stack([which for _, which, _ in conditions])
    repeated, curves = asked.take(row_I.tolist()), []
    for layer in range(subject.n_layers + 1):
        patches = chunk.restore(layer, row_I, which_IK)
        curves.append(repeated.margins(subject, chain(*patches)))
        _met(*patches)
    _met(*edits.values())
    records = [
        {
            "clean": float(clean[r]),
            "corrupted": float(corrupted["all"][r]),
            "extras": {name: float(margins[r]) for name, margins in extras.items()},
            "n_positions": int(used_RK[r].sum()),
            "restored": [None] * len(group.labels),
            "parts": {n: {"corrupted": float(corrupted[n][r])} for n, which_RK in several.items() if which_RK[r].any()},
        }
        for r in range(len(rows))
    ]
    for (r, _, key), curve in zip(conditions, np.array(curves).T.tolist()):
        if isinstance(key, int):
            records[r]["restored"][key] = curve
        elif key in several:
            records[r]["parts"][key]["restored"] = curve
        else:
            records[r][key] = curve
    return records


def trace_rows(
    subject: Subject, groups: Sequence[Group], status: dict[int, str], numbers: Sequence[int], seed: int
) -> list[dict]:
    """A record for each row number of the file: {"status", "groups": {name: `trace`'s record}}, groups of traced rows only."""
    found = {number: {"status": status[number]} for number in numbers}
    traced = [number for number in numbers if status[number] == "traced"]
    for group in groups if traced else ():
        place_of = {number: i for i, number in enumerate(group.asked.prompts.numbers)}
        for number, record in zip(traced, trace(subject, group, [place_of[number] for number in traced], seed)):
            found[number].setdefault("groups", {})[group.name] = record
    return [found[number] for number in numbers]


def _conditions(group: Group, used_RK: Tensor, several: dict[str, Tensor]) -> list[tuple[int, Tensor, int | str]]:
    """What is restored together: the row, which of its positions (bool [K]), and the bin or the name of it."""
    found = []
    for r, bins in enumerate(group.bin_RP.tolist()):
        one_KK = torch.eye(used_RK.shape[1], dtype=torch.bool)
        found += [(r, one_KK[k], p) for p, k in enumerate(bins) if k != NOWHERE]
        found += [(r, which_RK[r], name) for name, which_RK in several.items() if which_RK[r].any()]
        found += [(r, used_RK[r], "all"), (r, torch.zeros_like(used_RK[r]), "none")]
    return found


def _met(*edits: Patch) -> None:
    """An edit that misses its tokens looks like one without an effect. Caches of some kinds have prompts run twice."""
    for edit in edits:
        aimed = int((edit.positions_PK != NOWHERE).sum())
        if edit.n_hit not in (aimed, 2 * aimed):
            raise CheckFailed(f"an edit of layer {edit.layer} aimed at {aimed} states and met {edit.n_hit}")
