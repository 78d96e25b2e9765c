"""One sweep of noise scales over all questions, and the baselines it is read against; both resume where they were stopped.

    baselines = baselines_of(asker, settings, folder, stop)      # {"clean": [test, ...], "no_latents": ..., ...}
    questions = sweep(asker, settings, ("snr", None), info, folder, baselines["clean"], stop)

Baselines: `clean` (no noise), `no_latents` (markers around nothing), `plain` (the question alone), `zeroed` (zeros in all slots),
and `swapped` (the clean thoughts of another question in all slots). Scale 0 of a sweep is the clean baseline.

Shape letters: P questions, S slots, D width.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.interventions import Patch
from analysis.noise_answers import Answering
from analysis.noise_asker import Asker, trained, untrained
from analysis.noise_results import SCHEMA_VERSION, question_record, same_run, save_checkpoint, test_record, unfinished
from analysis.noise_rollout import LayerThoughts, clean_thoughts
from analysis.noise_settings import Settings
from analysis.scoring import donors
from checkpoint import versions
from dataset import MyCollator
from files import read_json, write_json
from stopping import Stopped, StopSignals

BASELINES = ("clean", "no_latents", "plain", "zeroed", "swapped")


# ---------------------------------------------------------------- who is asked


def asker_of(settings: Settings) -> Asker:
    """The model and the questions of an experiment."""
    common = {
        key: getattr(settings, key)
        for key in ("benchmark", "data", "question_seed", "device", "batch_size", "max_new_tokens", "dtype")
    } | {"num_questions": settings.n_questions}
    if settings.checkpoint is not None:
        return trained(settings.checkpoint, epoch=settings.epoch, **common)
    return untrained(settings.model, virtual_latents=settings.virtual_latents, **common)


# ---------------------------------------------------------------- what a file says of its making


def experiment_info(asker: Asker, settings: Settings) -> dict:
    """What all files of one experiment say of it, whatever the noise."""
    weight = asker.model.embedding.weight
    names = "\n".join(question.id for question in asker.questions)
    return {
        "schema_version": SCHEMA_VERSION,
        "timestamp": datetime.now().isoformat(timespec="seconds"),
        "benchmark": asker.benchmark,
        "num_questions": len(asker.questions),
        "questions_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "noise_layer": settings.noise_layer,
        "max_new_tokens": asker.max_new_tokens,
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "model": asker.name,
        "checkpoint": asker.checkpoint,
        "checkpoint_sha256": asker.checkpoint and _sha256(Path(asker.checkpoint)),
        "latent_passes": asker.n_latents,
        "seeds": {"noise": settings.seed, "questions": settings.question_seed, "swapped_thoughts": settings.seed},
        "versions": versions(),
    }


def noise_info(info: dict, settings: Settings, noise_type: str, direction: str | None) -> dict:
    """The same of one noise."""
    return info | {
        "noise_type": noise_type,
        "noise_direction": direction,
        "noise_scales": settings.scales_of(noise_type, direction),
        "noise_passes": settings.noise_passes,
        "injection_step": settings.injection_step,
        "noise_chain": settings.noise_chain,
        "schedule": settings.schedule,
        "lambda_decay": settings.lambda_decay,
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- baselines


def baselines_of(asker: Asker, settings: Settings, info: dict, folder: Path, stop: StopSignals) -> dict[str, list[dict]]:
    """{name: a test for each question}; kept in baselines.json, one after the other. `swapped` needs two questions."""
    path, found = folder / "baselines.json", {}
    if path.is_file():
        held = read_json(path, "experiment_info", "baselines")
        same_run(path, held["experiment_info"], info)
        found = held["baselines"]
    for name in BASELINES:
        if name in found or (name == "swapped" and len(asker.questions) < 2):
            continue
        found[name] = _baseline(asker, settings, name)
        with stop.deferred():
            write_json(path, {"experiment_info": info, "baselines": found})
        if stop.asked:
            raise Stopped(f"stopped by {stop.name}")
    return found


@torch.no_grad()
def _baseline(asker: Asker, settings: Settings, name: str) -> list[dict]:
    tokens = asker.tokens(name if name in ("no_latents", "plain") else "thoughts")
    edit = None
    if name in ("zeroed", "swapped"):
        slots_PS, thoughts_PSD = _thoughts(asker, tokens, settings.noise_layer)
        donor_P = donors((slots_PS >= 0).sum(1).numpy(), settings.seed) if name == "swapped" else None
        edit = Patch(0, slots_PS, torch.zeros_like(thoughts_PSD) if donor_P is None else thoughts_PSD[donor_P])
    layer = -1 if name in ("no_latents", "plain") else settings.noise_layer
    answering = Answering(
        asker.model,
        asker.tokenizer,
        max_new_tokens=asker.max_new_tokens,
        batch_size=asker.batch_size,
        noise_layer=layer,
        edit=edit,
    )
    said = {one.place: one for one in answering.run(tokens, [question.id for question in asker.questions])}
    return [test_record(asker, question, said[place]) for place, question in enumerate(asker.questions)]


def _thoughts(asker: Asker, tokens: Sequence[np.ndarray], noise_layer: int) -> tuple[Tensor, Tensor]:
    """Positions of the slots [P, S] and clean thoughts [P, S, D] of all questions that fit the model's positions; zeros else."""
    answering = Answering(asker.model, asker.tokenizer, noise_layer=noise_layer)
    collate = MyCollator(asker.tokenizer, asker.model.latent_token_id, left=True)
    limit = getattr(asker.model.base_causallm.config, "max_position_embeddings", None) or max(map(len, tokens))
    slots_PS = torch.from_numpy(np.stack([np.flatnonzero(x == asker.model.latent_token_id) for x in tokens]))
    weight = asker.model.embedding.weight
    thoughts_PSD = weight.new_zeros(*slots_PS.shape, weight.shape[1])
    order = sorted((i for i, x in enumerate(tokens) if len(x) <= limit), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), asker.batch_size):
        places = order[start : start + asker.batch_size]
        feed = None if answering.layer is None else LayerThoughts(asker.model, answering.layer)
        thoughts_PSD[places] = clean_thoughts(asker.model, collate, [tokens[i] for i in places], feed)[1]
    return slots_PS, thoughts_PSD


# ---------------------------------------------------------------- the sweep


def sweep(
    asker: Asker,
    settings: Settings,
    kind: tuple[str, str | None],
    info: dict,
    folder: Path,
    clean: Sequence[dict],
    stop: StopSignals,
    one_at_a_time: bool = False,
) -> list[dict]:
    """The records of all questions at all scales; `clean`: the tests of scale 0.

    Writes checkpoint_<n>.json every `checkpoint_interval` questions and when asked to stop, and goes on with the newest
    one. `one_at_a_time`: see `Answering`.
    """
    noise, scales = settings.noise(*kind), settings.scales_of(*kind)
    if noise.first_slot > asker.n_latents:
        raise ValueError(f"slot {noise.first_slot} meets noise first, but this model has {asker.n_latents} thoughts")
    answering = Answering(
        asker.model,
        asker.tokenizer,
        noise,
        [scale for scale in scales if scale != 0],
        asker.max_new_tokens,
        asker.batch_size,
        settings.noise_layer,
        settings.noise_chain,
        one_at_a_time=one_at_a_time,
    )
    tokens, done = asker.tokens(), unfinished(folder, info)
    known = {question.id for question in asker.questions}
    assert done.keys() <= known, "a checkpoint of the same questions"
    left = [place for place, question in enumerate(asker.questions) if question.id not in done]
    interval = settings.checkpoint_interval

    def in_order() -> list[dict]:
        return [done[question.id] for question in asker.questions if question.id in done]

    parts = [[*part] for _, part in groupby(left, key=_part(len(done), interval))]
    bar = tqdm(total=len(asker.questions), initial=len(done), desc="-".join(filter(None, kind)), disable=None, leave=False)
    try:
        for part in parts:
            for place, record in _answered(asker, answering, part, tokens, clean, scales):
                done[asker.questions[place].id] = record
                bar.update()
            with stop.deferred():
                save_checkpoint(folder, info, in_order())
            if stop.asked:
                raise Stopped(f"stopped by {stop.name}")
    except Stopped:
        with stop.deferred():
            save_checkpoint(folder, info, in_order())
        raise
    finally:
        bar.close()
    return in_order()


def _part(n_done: int, interval: int):
    """Numbers of the parts after which a checkpoint is due: the first one fills up what a stopped run has begun."""
    place_of = iter(range(n_done, 10**9))
    return lambda _: next(place_of) // interval


def _answered(
    asker: Asker, answering: Answering, part: list[int], tokens, clean: Sequence[dict], scales: list[float]
) -> Iterator[tuple[int, dict]]:
    """(place, record) of each question when all its scales are done."""
    tests: dict[int, dict[float, dict]] = defaultdict(dict)
    if 0 in scales:
        for place in part:
            tests[place][0.0] = clean[place] | {"noise_scale": 0.0}
    ids = [asker.questions[place].id for place in part]
    if not answering.scales:
        yield from ((place, question_record(asker.questions[place], [tests[place][0.0]])) for place in part)
        return
    for said in answering.run([tokens[place] for place in part], ids):
        place = part[said.place]
        question = asker.questions[place]
        tests[place][said.scale] = test_record(asker, question, said)
        if len(tests[place]) == len(scales):
            yield place, question_record(question, [tests[place][scale] for scale in scales])
