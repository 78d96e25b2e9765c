"""Health checks of the function itself, which hold of any weights: what a logit may depend on, and what the loss is.

    causality(patient)      tokens behind a column change nothing up to it
    repeat, permutation, batch_size, padding, state, cached      the same question has one answer, however it is asked
    prefixes(patient)       a row's end, cut off, does not make its beginning harder
    loss, training_targets  cross-entropy of the next token, also in the training pass

They are asked of the wrapper, with its thoughts, and of the bare model; values are the worse of both, differences of logits in
units of their standard deviation (sd).

Shape letters: B rows, T columns, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.health_patient import Patient, Result, n_prefix, not_applicable, real
from attention import append_cache

ROWS = 6
CUTS = 6  # columns behind which tokens are edited
PADDED = 3  # columns of padding on either side
ONE_BY_ONE = 32  # columns fed one at a time
PREFIXES = 192  # positions that are asked again of a row cut there
POINTS = 2.0
GRADIENT_TOLERANCE = 1e-3  # of the largest where it belongs
FLOOR = 1e-12  # of the logits' deviation, where all are equal


def deviation(a: Tensor, b: Tensor, where_BT: Tensor | None = None) -> float:
    """The largest difference of logits, in units of their standard deviation over the vocabulary; inf where one isn't finite."""
    if where_BT is not None:
        a, b = a[where_BT], b[where_BT]
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / a.std(-1).mean().clamp(min=FLOOR)).item() if a.numel() else 0.0


def _worst(found: dict[str, float]) -> str:
    """The path with the largest value; what is no number is larger than any."""
    return max(found, key=lambda path: (math.isnan(found[path]), found[path]))


def _judged(name: str, limit: float, found: dict[str, float], what: str) -> Result:
    worst = _worst(found)
    detail = f"{what}; worst: {worst}" if not found[worst] <= limit else what
    return Result(name, found[worst], f"<= {limit:g} sd", found[worst] <= limit, detail, found)


# ---------------------------------------------------------------- what a logit may depend on


def causality(patient: Patient) -> list[Result]:
    """Edit all tokens behind a column: logits up to it stay. Thoughts and markers keep their places."""
    generator = torch.Generator().manual_seed(patient.seed)
    with patient.precise() as tolerance:
        batch = patient.batch(patient.thinking[:ROWS])
        columns_T = torch.arange(batch["input_ids"].shape[1], device=patient.subject.device)
        before, found = {name: logits(batch) for name, logits in patient.paths.items()}, dict.fromkeys(patient.paths, 0.0)
        last = int(real(batch).sum(0).nonzero().max())
        cuts = torch.randperm(last, generator=generator)[:CUTS].tolist()
        for cut in cuts:
            other = batch | {"input_ids": _edited(patient, batch, columns_T > cut, generator)}
            kept = real(batch) & (columns_T <= cut)
            for name, logits in patient.paths.items():
                found[name] = max(found[name], deviation(before[name], logits(other), kept))
    return [_judged("causality", tolerance, found, f"logits up to {len(cuts)} columns after edits behind them")]


def _edited(patient: Patient, batch: dict, where_T: Tensor, generator: torch.Generator) -> Tensor:
    """Every word in some columns replaced by another; what is no word stays."""
    ids, words = batch["input_ids"], torch.tensor(patient.words)
    chosen = words[torch.randint(len(words), ids.shape, generator=generator)].to(ids.device)
    words = words.to(ids.device)
    chosen = torch.where(chosen == ids, words[(torch.searchsorted(words, ids) + 1) % len(words)], chosen)
    return torch.where(where_T & real(batch) & torch.isin(ids, words), chosen, ids)


@torch.no_grad()
def prefixes(patient: Patient) -> list[Result]:
    """Accuracy on whole rows minus accuracy on rows cut right behind the column asked, in points."""
    rows, generator = patient.rows, torch.Generator().manual_seed(patient.seed)
    places = [(i, c) for i, row in enumerate(rows) for c in range(max(n_prefix(row) - 1, 0), len(row["input_ids"]) - 1)]
    places = [places[i] for i in torch.randperm(len(places), generator=generator)[:PREFIXES].tolist()]
    truth = torch.tensor([rows[i]["input_ids"][c + 1] for i, c in places])
    cut = [{key: rows[i][key][: c + 1] for key in ("input_ids", "labels")} for i, c in places]
    logits_of = patient.paths["wrapper"]
    whole = torch.cat([_row_by_row(logits_of(batch).argmax(-1), real(batch)) for batch in patient.batches(rows)]).cpu()
    starts = torch.tensor([0] + [len(row["input_ids"]) for row in rows]).cumsum(0)
    told = whole[torch.tensor([int(starts[i]) + c for i, c in places])]
    alone = []
    for batch in patient.batches(cut):
        last_B = batch["attention_mask"].shape[1] - 1 - batch["attention_mask"].flip(1).argmax(1)
        alone.append(logits_of(batch)[torch.arange(len(last_B)), last_B].argmax(-1).cpu())
    whole_accuracy, cut_accuracy = ((x == truth).double().mean().item() for x in (told, torch.cat(alone)))
    gap = 100 * (whole_accuracy - cut_accuracy)
    figures = {"teacher_forced_accuracy": whole_accuracy, "prefix_accuracy": cut_accuracy, "n": len(places)}
    detail = f"{whole_accuracy:.1%} on whole rows, {cut_accuracy:.1%} on prefixes, of {len(places)} tokens"
    return [Result("prefixes", gap, f"<= {POINTS:g} points", gap <= POINTS, detail, figures)]


def _row_by_row(x_BT: Tensor, real_BT: Tensor) -> Tensor:
    return torch.cat([x[seen] for x, seen in zip(x_BT, real_BT)])


# ---------------------------------------------------------------- one question, one answer


def repeat(patient: Patient) -> list[Result]:
    """The same batch twice, with another one in between."""

    def again(logits, batch, before):
        logits(patient.batch(patient.thinking[-2:]))
        return deviation(before, logits(batch), real(batch))

    return [_compared(patient, "repeat", again, "a batch asked twice, another between")]


def permutation(patient: Patient) -> list[Result]:
    """Rows in another order."""

    def moved(logits, batch, before):
        turned = {key: value.roll(1, 0) for key, value in batch.items()}
        return deviation(before, logits(turned).roll(-1, 0), real(batch))

    return [_compared(patient, "permutation", moved, "rows in another order")]


def batch_size(patient: Patient) -> list[Result]:
    """Each row alone."""

    def alone(logits, batch, before):
        worst = 0.0
        for b, seen_T in enumerate(real(batch)):
            row = {key: value[b : b + 1, seen_T] for key, value in batch.items()}
            worst = max(worst, deviation(before[b, seen_T], logits(row)[0]))
        return worst

    return [_compared(patient, "batch_size", alone, "rows alone and in a batch")]


def padding(patient: Patient) -> list[Result]:
    """More padding on the left and on the right, of random tokens."""
    draw = torch.Generator().manual_seed(patient.seed)

    def padded(logits, batch, before):
        words = torch.tensor(patient.words)
        sides = [words[torch.randint(len(words), (len(before), PADDED), generator=draw)].to(before.device) for _ in "lr"]
        wider = {key: F.pad(batch[key], (PADDED, PADDED)) for key in ("attention_mask", "position_ids")}
        wider["input_ids"] = torch.cat([sides[0], batch["input_ids"], sides[1]], 1)
        return deviation(before, logits(wider)[:, PADDED:-PADDED], real(batch))

    return [_compared(patient, "padding", padded, f"{PADDED} columns of padding on either side")]


def _compared(patient: Patient, name: str, compare: Callable[..., float], what: str) -> Result:
    """`compare(logits_of, batch, logits before)` on both paths."""
    with patient.precise() as tolerance:
        batch = patient.batch(patient.thinking[:ROWS])
        found = {path: compare(logits, batch, logits(batch)) for path, logits in patient.paths.items()}
    return _judged(name, tolerance, found, what)


@torch.no_grad()
def state(patient: Patient) -> list[Result]:
    """No parameter or buffer moves in evaluation or generation."""
    model = patient.model

    def tensors() -> dict[str, Tensor]:
        return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}

    before = {name: x.clone() for name, x in tensors().items()}
    batch = patient.batch(patient.thinking[:ROWS])
    for logits in patient.paths.values():
        logits(batch)
    if not patient.single_pass_only:
        patient.generated(patient.prompts[:2], 4)
    after = tensors()
    moved = sorted({*before} ^ {*after}) + [n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])]
    detail = "moved: " + ", ".join(moved[:5]) if moved else f"{len(before)} tensors after evaluation and generation"
    return [Result("state", len(moved), "0 tensors moved", not moved, detail, {"moved": moved})]


def cached(patient: Patient) -> list[Result]:
    """Rows column by column from a cache: the text behind the thoughts by the wrapper, whole rows by the bare model."""
    if patient.single_pass_only:
        return [not_applicable("cached", patient.single_pass_only)]
    found = dict.fromkeys(patient.paths, 0.0)
    with patient.precise() as tolerance:
        for row in patient.thinking[:2]:
            start = n_prefix(row)
            batch = {key: value[:, : start + ONE_BY_ONE] for key, value in patient.batch([row]).items()}
            for name, steps in {"wrapper": _extended(patient, batch, start), "bare": _one_by_one(patient, batch)}.items():
                found[name] = max(found[name], deviation(patient.paths[name](batch), steps))
    return [_judged("cached", tolerance, found, "rows fed one token at a time")]


def _extended(patient: Patient, batch: dict, start: int) -> Tensor:
    model, ids = patient.model, batch["input_ids"]
    cache = append_cache(patient.bare.config, ids.shape[1])
    states = [model.rollout(ids[:, :start], cache=cache).hidden_BTD]
    states += [model.extend(ids[:, t : t + 1], cache, t).hidden_BTD for t in range(start, ids.shape[1])]
    return model.head(torch.cat(states, 1))


def _one_by_one(patient: Patient, batch: dict) -> Tensor:
    past, logits = None, []
    for t in range(batch["input_ids"].shape[1]):
        given = {"input_ids": batch["input_ids"][:, t : t + 1], "attention_mask": batch["attention_mask"][:, : t + 1]}
        out = patient.bare(**given, position_ids=batch["position_ids"][:, t : t + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


# ---------------------------------------------------------------- the loss


def loss(patient: Patient) -> list[Result]:
    """The loss of the wrapper, and of the bare model by `labels`, equals cross-entropy of the next tokens by hand."""
    with patient.precise() as tolerance:
        batch = patient.batch(patient.thinking[:ROWS])
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids", "labels")}
        said = {"wrapper": _said_loss(patient.model(**given)), "bare": _said_loss(patient.bare(**given, use_cache=False))}
        found, by_hand = {}, {}
        for name, logits_of in patient.paths.items():
            logits, labels = logits_of(batch), batch["labels"]
            by_hand[name] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
            found[name] = abs(said[name] - by_hand[name]) / max(by_hand[name], 1.0)
    wrong = ((batch["labels"] != -100) & (batch["labels"] != batch["input_ids"])).sum().item()
    worst = _worst(found)
    ok = found[worst] <= tolerance and not wrong
    detail = f"{worst}: {said[worst]:.4f}, by hand {by_hand[worst]:.4f}" + (f"; {wrong} labels are no input" if wrong else "")
    return [Result("loss", found[worst], f"<= {tolerance:g} apart", ok, detail, {"said": said, "by_hand": by_hand})]


def _said_loss(out) -> float:
    """The loss that a forward returned; NaN where it returned none."""
    return float("nan") if out.loss is None else out.loss.item()


def training_targets(patient: Patient) -> list[Result]:
    """In the training pass, what a label says reaches no column behind the one that must predict it.

    Two passes with the same dropout and another target differ, in their gradients, in what hangs on that target alone.
    """
    row = patient.thinking[0]
    column, size = n_prefix(row), len(row["input_ids"])
    column = min(column + (size - column) // 2, size - 2)
    found, reached = {}, {}
    for name, module in {"wrapper": patient.model, "bare": patient.bare}.items():
        a, b = (_input_gradient(patient, module, row, column, target) for target in patient.words[:2])
        norms_T = (a - b).double().norm(dim=-1)
        scale = norms_T[: column + 1].max().clamp(min=FLOOR).item()
        found[name], reached[name] = norms_T[column + 1 :].max().item() / scale, norms_T[: column + 1].max().item()
    worst, limit = _worst(found), GRADIENT_TOLERANCE
    ok = found[worst] <= limit and all(reached.values())
    detail = f"{worst}: gradient at later columns over that at earlier ones"
    return [Result("training_targets", found[worst], f"<= {limit:g}", ok, detail, {"later": found, "earlier": reached})]


def _input_gradient(patient: Patient, module, row: dict, column: int, target: int) -> Tensor:
    """The gradient [T, D] at the embeddings of a row whose only label stands behind `column`."""
    batch = patient.batch([row])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, column + 1] = target
    seen = []
    handle = patient.model.embedding.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    module.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(patient.seed)
            module(**batch, **({} if module is patient.model else {"use_cache": False})).loss.backward()
    finally:
        handle.remove()
        patient.model.zero_grad(set_to_none=True)
        patient.model.eval()
        getattr(patient.bare, "forget_scores", lambda: None)()
    return seen[0].grad[0]
