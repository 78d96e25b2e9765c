"""Several answers to each question, with independent noise on the thoughts and by chance: votes, abstention, path diversity.

    python -m analysis.branching args/noise_branch.yaml --checkpoint runs/prosqa/prosqa-coconut --num-questions 500
    python analysis/branching.py --checkpoint runs/gsm/gsm-coconut --num-branches 5 --scales 0.2 0.5 1 --temperature 0.7
    bash scripts/run_branch_experiment.sh --checkpoint runs/prosqa/prosqa-coconut

Every scale and no noise are run at temperature 0 and at the given one, so that what noise does and what sampling does can be
told apart. Writes final_results.json, report.md, coverage_accuracy.png and path_diversity.png to --output-dir (variants: to a
folder of it each). The same command goes on where it was stopped. Exit codes: 0; 1 where more than 5 % of the branches failed
in a cell; 2 for a mistake; 75 when stopped by a signal.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

if __package__ in (None, ""):  # run as `python analysis/branching.py`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm  # noqa: E402

from analysis.branching_report import coverage_figure, diversity_figure, report  # noqa: E402
from analysis.branching_results import cell_record, result_of, save_checkpoint  # noqa: E402
from analysis.branching_rollout import Branch, Branching, Cell  # noqa: E402
from analysis.branching_settings import Branches, BranchSettings, read_settings  # noqa: E402
from analysis.command import command  # noqa: E402
from analysis.noise_asker import Asker  # noqa: E402
from analysis.noise_results import not_a_run_folder, question_record, same_run, unfinished  # noqa: E402
from analysis.noise_sweep import asker_of, baselines_of, experiment_info, noise_info  # noqa: E402
from files import read_json, write_json, write_whole  # noqa: E402
from stopping import Stopped, StopSignals  # noqa: E402

FINAL = "final_results.json"


@command
def main(argv: list[str] | None = None) -> int:
    """Run from the command line; see the module for the exit codes."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with StopSignals() as stop:
        return experiment(read_settings(argv, __doc__), stop)


def experiment(asked: BranchSettings, stop: StopSignals) -> int:
    """All variants of the settings; returns the exit code."""
    base, variants = asked.base.settings, asked.variants()
    folder = base.output_dir
    not_a_run_folder(folder)
    asker = asker_of(base)
    possible = [(name, one) for name, one in variants if one.noise.at_step <= asker.n_latents]
    if not possible:
        raise ValueError(f"injection_step: this model has {asker.n_latents} thoughts")
    for name in {name for name, _ in variants} - {name for name, _ in possible}:
        print(f"{name}: left out, this model has {asker.n_latents} thoughts", flush=True)
    info = experiment_info(asker, base)
    folder.mkdir(parents=True, exist_ok=True)
    baselines = baselines_of(asker, base, info, folder, stop)
    claimed = True
    for name, one in possible:
        place = folder / name
        place.mkdir(exist_ok=True)
        result = _one(asker, one, info, place, baselines, stop)
        print((f"\n## {name}\n\n" if name else "") + report(result), flush=True)
        print(f"written: {place / FINAL}", flush=True)
        if not result["accuracy_claimed"]:
            print(f"error: more than 5 % of the branches failed; {place / FINAL} claims no accuracy", file=sys.stderr)
            claimed = False
    return 0 if claimed else 1


def _one(asker: Asker, one: Branches, info: dict, folder: Path, baselines: dict, stop: StopSignals) -> dict:
    """The result of one variant; one that is finished is read."""
    info, path = branch_info(info, one), folder / FINAL
    if path.is_file():
        result = read_json(path, "experiment_info", "grid")
        same_run(path, result["experiment_info"], info)
        return result
    questions = answered(asker, one, info, folder, stop)
    result = result_of(info, questions, one.cells(), baselines)
    with stop.deferred():
        if result["accuracy_claimed"]:
            coverage_figure(result, folder / "coverage_accuracy.png")
            diversity_figure(result, folder / "path_diversity.png")
        write_whole(folder / "report.md", report(result) + "\n")
        if one.settings.save_results:
            write_json(folder / f"results_{datetime.now():%Y%m%d_%H%M%S}.json", result)
        write_json(path, result)
    return result


def branch_info(info: dict, one: Branches) -> dict:
    """`experiment_info` of one variant."""
    settings, own = one.settings, one.own
    return noise_info(info, settings, *one.kind) | {
        "noise_scales": list(dict.fromkeys(cell.scale for cell in one.cells())),
        "num_branches": own.num_branches,
        "temperature": own.temperature,
        "temperatures": [0.0, own.temperature],
        "top_p": own.top_p,
        "aggregator": "majority",
        "seeds": info["seeds"] | {"noise": settings.seed, "sampling": own.sampling_seed},
    }


def branching_of(asker: Asker, one: Branches, one_at_a_time: bool = False) -> Branching:
    """The branches of an experiment. A batch has as many rows as one of a sweep: questions x branches."""
    settings, own = one.settings, one.own
    return Branching(
        asker.model,
        own.num_branches,
        one.noise,
        asker.max_new_tokens,
        own.top_p,
        own.sampling_seed,
        max(1, (settings.batch_size or asker.batch_size) // own.num_branches),
        settings.noise_layer,
        settings.noise_chain,
        one_at_a_time,
    )


def answered(
    asker: Asker, one: Branches, info: dict, folder: Path, stop: StopSignals, one_at_a_time: bool = False
) -> list[dict]:
    """The records of all questions. Writes checkpoint_<n>.json every `checkpoint_interval` questions and when asked to stop,
    and goes on with the newest one."""
    branching, cells, interval = branching_of(asker, one, one_at_a_time), one.cells(), one.settings.checkpoint_interval
    done, places = unfinished(folder, info), {question.id: i for i, question in enumerate(asker.questions)}

    def in_order() -> list[dict]:
        return [done[question_id] for question_id in places if question_id in done]

    bar = tqdm(total=len(places), initial=len(done), desc="branches", unit="question", disable=None, leave=False)
    try:
        while left := [i for question_id, i in places.items() if question_id not in done]:
            for record in _part(asker, branching, cells, left[: interval - len(done) % interval]):
                done[record["question_id"]] = record
                bar.update()
            with stop.deferred():
                save_checkpoint(folder, info, in_order(), cells)
            if stop.asked:
                raise Stopped(f"stopped by {stop.name}")
    except Stopped:
        with stop.deferred():
            save_checkpoint(folder, info, in_order(), cells)
        raise
    finally:
        bar.close()
    return in_order()


def _part(asker: Asker, branching: Branching, cells: list[Cell], places: list[int]) -> Iterator[dict]:
    """The record of each of some questions when all its cells are done."""
    tokens = asker.tokens()
    questions = [asker.questions[i] for i in places]
    found: dict[int, dict[Cell, list[Branch]]] = defaultdict(dict)
    asked = [tokens[i] for i in places], [question.id for question in questions]
    for place, cell, branches in branching.run(*asked, cells):
        found[place][cell] = branches
        if len(found[place]) == len(cells):
            said, question = found.pop(place), questions[place]
            yield question_record(question, [cell_record(asker, question, cell, said[cell]) for cell in cells])


if __name__ == "__main__":
    sys.exit(main())
