"""Which keys of a run config contradict each other, in words that name the key and the way out (`utils.check_config` asks)."""

METHOD_FLAGS = ("coconut", "cot", "no_thoughts", "no_cot")
PAUSE_MODES = ("frozen", "learned_shared", "pause_curriculum")
FEEDBACK_NAMES = ("continuous", *PAUSE_MODES, "pause_multipass")
OWN_BACKBONES = ("lahr", "cognate")
NO_PATH = ("None", "none", "null", "")  # how stock files write that there is none


def contradictions(given: dict) -> list[str]:
    """Everything that two or more keys of raw config values (none of them None) say against each other, a sentence each."""
    on = [flag for flag in METHOD_FLAGS if _switched_on(given, flag)]
    return [
        *_of_method(on, given),
        *_of_feedback(on, given),
        *_of_backbone(given),
        *_of_training(given),
        *_with_phase1(given),
        *_with_fsdp2(given),
        *_with_lora(given),
    ]


def _switched_on(given: dict, key: str) -> bool:
    return str(given.get(key, False)).lower() in ("true", "yes", "on", "1")


def _of_method(on: list[str], given: dict) -> list[str]:
    if not any(key in given for key in METHOD_FLAGS):
        return [f"method: give at least one of {', '.join(METHOD_FLAGS)}"]
    if not on and not all(key in given for key in METHOD_FLAGS):
        return [f"method: nothing is True; for pause-as-thought write all of {', '.join(METHOD_FLAGS)} as False"]
    if _switched_on(given, "icot") and (on != ["cot"] or given.get("uniform_prob")):
        return ["icot: shortens the chains of cot; set cot: True, no other method, and no uniform_prob"]
    if len(on) > 1 and set(on) != {"coconut", "no_thoughts"}:
        return [f"method: {' and '.join(on)} contradict each other; set one of them to True"]
    return []


def _of_feedback(on: list[str], given: dict) -> list[str]:
    mode, thinks = given.get("feedback_mode", "continuous"), "coconut" in on and "no_thoughts" not in on
    if mode not in FEEDBACK_NAMES:
        return [f"feedback_mode: {mode!r} is unknown; known: {', '.join(FEEDBACK_NAMES)}"]
    problems = [] if mode == "continuous" or thinks else [f"feedback_mode: {mode} needs coconut: True and thoughts"]
    if not (thinks and mode == "continuous"):
        asked = {"latent_iterations": given.get("latent_iterations"), "latent_norm": given.get("latent_norm", "none") != "none"}
        problems += [f"{key}: needs coconut: True and feedback_mode: continuous" for key, value in asked.items() if value]
    return problems


def _of_backbone(given: dict) -> list[str]:
    name, problems = given.get("model_id"), []
    if name not in OWN_BACKBONES:
        return []
    if not given.get("from_scratch"):
        problems.append(f"model_id: {name} has no weights of its own; set from_scratch: True, or name a folder")
    if given.get("tokenizer") in (None, *NO_PATH):
        problems.append(f"tokenizer: missing; {name} has none, name a hub id or folder (backbones/characters)")
    return problems


def _of_training(given: dict) -> list[str]:
    problems = []
    if given.get("compile") and given.get("activation_checkpointing"):
        problems.append("compile: cannot be combined with activation_checkpointing; set one of them to False")
    for one, other in (("warmup_steps", "warmup_epochs"), ("min_lr", "min_lr_ratio")):
        if given.get(one) is not None and given.get(other):
            problems.append(f"{one}: also given as {other}; keep one")
    if given.get("batch_size_training") == "auto" and given.get("gradient_accumulation_steps", 1) != 1:
        problems.append("batch_size_training: auto sets the accumulation itself; give effective_batch_size instead")
    return problems


def _with_phase1(given: dict) -> list[str]:
    if given.get("checkpoint_format") != "phase1":
        return []
    clashes = [f"{key}:" for key in ("save_only_improve", "reset_optimizer") if given.get(key)]
    clashes += ["parallel: fsdp2"] if given.get("parallel") == "fsdp2" else []
    return [f"{key} cannot be combined with checkpoint_format: phase1; leave it out" for key in clashes]


def _with_fsdp2(given: dict) -> list[str]:
    if given.get("parallel") != "fsdp2":
        return []
    clashes = {
        "compile: cannot be combined with parallel: fsdp2; set it to False": given.get("compile"),
        "batch_size_training: auto cannot be combined with parallel: fsdp2; give a number": (
            given.get("batch_size_training") == "auto"
        ),
        "weight_ema: cannot be combined with parallel: fsdp2; leave it out": given.get("weight_ema") is not None,
        "bf16: pure cannot be combined with parallel: fsdp2; True keeps float32 master weights in the shards": (
            given.get("bf16") == "pure"
        ),
    }
    return [problem for problem, found in clashes.items() if found]


def _with_lora(given: dict) -> list[str]:
    if given.get("lora") is None:
        return []
    others = {
        "parallel: fsdp2": given.get("parallel") == "fsdp2",
        "checkpoint_format: phase1": given.get("checkpoint_format") == "phase1",
        "compile": given.get("compile"),
        "weight_ema": given.get("weight_ema") is not None,
        "save_training_state: False": given.get("save_training_state") is False,  # checkpoint_N holds no adapters
        f"model_id: {given.get('model_id')}": given.get("model_id") in OWN_BACKBONES,
    }
    return [f"lora: cannot be combined with {key}; leave one out" for key, found in others.items() if found]
