"""All health checks by name, in the order of the report, and how a set of them is run.

results = run_checks(patient)                          # [Result, ...]
results = run_checks(patient, ["causality", "echo"])   # some of them; ValueError for a name that is none
"""

import difflib
from collections.abc import Callable, Sequence

from analysis import health_function, health_gradients, health_halting, health_memory, health_routing, health_run, health_words
from analysis.health_patient import Patient, Result

CHECKS: dict[str, Callable[[Patient], list[Result]]] = {
    "causality": health_function.causality,
    "repeat": health_function.repeat,
    "permutation": health_function.permutation,
    "batch_size": health_function.batch_size,
    "padding": health_function.padding,
    "state": health_function.state,
    "cached": health_function.cached,
    "loss": health_function.loss,
    "training_targets": health_function.training_targets,
    "prefixes": health_function.prefixes,
    "gradients": health_gradients.gradients,
    "router_gradient": health_gradients.router_gradient,
    "halting_gradient": health_gradients.halting_gradient,
    "echo": health_words.echo,
    "variety": health_words.variety,
    "questions": health_words.questions,
    "halting": health_halting.halting,
    "routing": health_routing.routing,
    "memory": health_memory.memory,
    "learning_rate": health_run.learning_rate,
    "weights_move": health_run.weights_move,
    "validation": health_run.validation,
    "disjoint": health_run.disjoint,
}


def chosen(names: Sequence[str] | None) -> list[str]:
    """The names of the checks to run (None: all). ValueError with the nearest name where one is unknown."""
    for name in names or ():
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, 1)
            hint = f", did you mean {near[0]}?" if near else f"; known: {', '.join(CHECKS)}"
            raise ValueError(f"--only: {name!r} is no check{hint}")
    return [name for name in CHECKS if names is None or name in names]


def run_checks(patient: Patient, names: Sequence[str] | None = None) -> list[Result]:
    """The results of all checks, or of some. What a model refuses or breaks at is a failed check, not the end of the rest."""
    results = []
    for name in chosen(names):
        try:
            results += CHECKS[name](patient)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:300]
            results.append(Result(name, None, "", False, f"could not be run: {type(error).__name__}: {reason}"))
    return results
