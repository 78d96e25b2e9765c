"""Train or evaluate one model from one YAML file.

    python run.py args/prosqa_coconut_1gpu.yaml                          one process on CUDA, MPS or CPU
    torchrun --nproc_per_node=4 run.py args/prosqa_coconut.yaml          several GPUs (nccl), or CPU processes (gloo)
    python run.py args/prosqa_m5_pause.yaml lr=3e-4 name=m5-lr3e-4       any key may follow as key=value

The same command after an interruption goes on where the run stopped, also with another number of processes. Outputs go to
<save_path>/<name>/: checkpoint_N after every epoch, metrics.jsonl, eval_N.jsonl with one record a question; the log lines go
to stdout, progress to stderr. Exit codes: 0 done, 1 loss not finite, 2 a mistake in config or data, 75 interrupted with
everything saved (SIGTERM, SIGUSR1, Ctrl-C, a full disk, another process gone): start the same command again.
"""

import argparse
import hashlib
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

import backbones
from accounting import Shape, peak_flops
from averaging import WeightAverage
from checkpoint import build_model, find_checkpoint, versions
from coconut import Coconut, decoder_blocks
from compiled import compile_passes, forget_trials, uncompile
from dataset import StageDataset, get_cot_latent_dataset
from evaluate import validate, wants_two_choice
from files import NoRoom, write_json
from lora import add_adapters
from microbatch import candidates, largest_micro_batch
from monitoring import Alarms
from parallel import Alone, make_parallel
from phase1 import Phase1Folder
from recompute import recompute_blocks
from reporting import Meter, Metrics
from run_folder import Position, RunFolder, is_snapshot, read_snapshot
from saving import Saver, announce_disk_need
from stopping import DONE, MISTAKE, NOT_FINITE, REQUEUE, Stopped, StopSignals
from tokens import TokenTable, get_dataset, load_rows, no_garbage_collection
from training import host_batch, on_device, train, update_size
from utils import Config, keys_and_defaults, load_config, set_seed
from world import World, process_group


@dataclass
class Run:
    """Everything that training and evaluation share."""

    config: Config
    world: World
    folder: RunFolder
    model: Coconut
    tokenizer: object
    ids: backbones.ThoughtIds
    val_rows: list[dict]
    val: TokenTable
    train: TokenTable | None
    stop: StopSignals = field(default_factory=StopSignals)
    parallel: Alone = None
    saver: Saver = None
    average: WeightAverage | None = None
    micro_batches_per_update: int = 1
    metrics: Metrics = None
    meter: Meter = None
    alarms: Alarms = field(default_factory=lambda: Alarms(enabled=False))
    evaluated: dict[int, dict] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether this process writes to the run folder."""
        return self.world.is_main and not self.config.debug

    def precision(self):
        """bf16 autocast over float32 master weights, or nothing."""
        autocast = self.config.bf16 is True
        return torch.autocast(self.world.device.type, torch.bfloat16) if autocast else nullcontext()

    @contextmanager
    def evaluating(self):
        """The weights that evaluations and checkpoints see: all of them on this rank, and their average where one is kept."""
        with self.parallel.whole(), self.average.in_place_of(self.model) if self.average else nullcontext():
            yield

    def score(self, record: dict) -> float:
        """How good an evaluation is, by `select_by`: more is better."""
        return record["eval/acc"] if self.config.select_by == "accuracy" else -record["eval/loss"]

    def rows(self, get, stage: int, table: TokenTable, **kwargs) -> StageDataset:
        """The rows of a stage: `get` is get_cot_latent_dataset (training) or get_question_latent_dataset (prompts)."""
        ids = self.ids
        return get(stage, table, self.config, ids.start, ids.latent, ids.end, not self.config.markers, **kwargs)


# ---------------------------------------------------------------- start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys, defaults, and what is allowed:\n" + keys_and_defaults(),
    )
    parser.add_argument("config", help="YAML file, one complete experiment (see args/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the file")
    args = parser.parse_args(argv)
    rank, code = "", MISTAKE
    try:
        with StopSignals() as stop:
            config = load_config(args.config, args.overrides)
            with process_group(config.device, always=config.parallel == "fsdp2") as world:
                rank = f" (rank {world.rank})" if world.rank else ""
                world.print(f"Config: {yaml.safe_load(Path(args.config).read_text())}")
                execute(config, world, stop)
        return DONE
    except FloatingPointError as error:
        message, code = f"error{rank}: {error}", NOT_FINITE
    except (Stopped, NoRoom) as error:
        message, code = f"interrupted{rank}: {error}; the same command goes on from there", REQUEUE
    except (ValueError, OSError) as error:
        message = f"error{rank}: {error}"
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        message = (
            f"interrupted{rank}: another process of this job is gone ({' '.join(str(error).split())[:120]}); start it again"
        )
        code = REQUEUE
    print(message, file=sys.stderr, flush=True)
    return code


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended; backends have no common type for it."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in ("gloo", "NCCL", "closed by peer"))


def execute(config: Config, world: World, stop: StopSignals | None = None) -> None:
    """Prepare, then train or evaluate. Raises Stopped where `stop` (default: none) was asked for, with everything saved."""
    set_seed(config.seed)
    if config.tf32:
        torch.set_float32_matmul_precision("high")
    folder = Phase1Folder(config) if config.checkpoint_format == "phase1" else RunFolder(config)
    if world.is_main:
        folder.open(exclusive=not config.only_eval and not config.debug)
    world.barrier()
    before = world.from_main(folder.before() if world.is_main else None)
    resumed, position, source, restore = find_start(config, world, folder)
    if not config.only_eval and not resumed and config.resume >= config.num_epochs:
        raise ValueError(f"resume: {config.resume} must be below num_epochs ({config.num_epochs}); nothing would be trained")
    with no_garbage_collection():
        val_rows, tables, facts = load_data(config, world)  # what is wrong with the data is said before a model is loaded
    model, tokenizer, ids, report = build_model(config, *source)
    folder.tokenizer = tokenizer
    if report is not None:
        print(report, flush=True)
    print(f"Running FSDP on rank = {world.rank}, world size = {world.size}", flush=True)
    if config.bf16 == "pure":
        model.to(torch.bfloat16)
    if config.lora and not config.only_eval:
        world.print(add_adapters(model, config.lora, [i for i in ids if i is not None], config.seed))
        if resumed:
            restore(model)
    world.print(model)
    if config.parallel == "ddp" or config.only_eval:  # shards move to their devices one by one
        model.to(world.device)
    run = Run(config, world, folder, model, tokenizer, ids, val_rows, tables["val_path"], tables.get("train_path"))
    run.stop = stop or run.stop
    check_lengths(run)
    speed_up(run)

    if config.only_eval:
        name = f"eval_{Path(config.val_path).stem}"
        summary = validate(run, config.resume, f"{name}.jsonl")
        if world.is_main:  # what was evaluated: the records alone do not say
            about = {"checkpoint": source[0] and str(source[0]), "config": config.model_dump(), "versions": versions()}
            write_json(config.run_dir / f"{name}.json", about | {"data": facts["val_path"], "summary": summary})
        return
    config = run.config
    run.micro_batches_per_update = update_size(config, world, before if resumed else None, position)
    if run.writes:
        folder.begin(model, world_size=world.size, micro_batches_per_update=run.micro_batches_per_update, data=facts)
        announce_disk_need(config, model, config.num_epochs - position.epoch, folder.path)
    run.parallel = make_parallel(model, world, config)
    if resumed and run.parallel.sharded and source == (None, None):
        from sharding import load_sharded_model

        load_sharded_model(folder.path / f"last_shards_{position.global_step}", model)
    run.average = WeightAverage(model, config.weight_ema) if config.weight_ema else None
    if restore is not None and run.average is not None:
        restore(model, None, run.average)
    run.alarms = Alarms(config.alarms, say=world.print)
    run.saver = Saver(folder, model, run.parallel, world, not config.debug, run.average)
    run.metrics = Metrics(config, folder.path, run.writes)
    run.evaluated = world.from_main(folder.evaluations(position.epoch) if world.is_main else None)
    run.metrics.log(event="start", epoch=position.epoch, step_in_epoch=position.step, world_size=world.size)
    try:
        train(run, position, restore, resumed)
        if run.writes:
            run.meter.print_summary({epoch: record["eval/acc"] for epoch, record in run.evaluated.items()})
        run.metrics.log(event="end", epoch=position.epoch - 1, seconds=run.meter.seconds())
    except (Stopped, NoRoom, FloatingPointError) as error:
        run.metrics.log(event="stopped", epoch=position.epoch, step_in_epoch=position.step, reason=str(error))
        raise
    finally:
        run.saver.close()
        run.metrics.close()


def speed_up(run: Run) -> None:
    """What makes this run fast or small on this machine: recomputation, the micro-batch, compiled passes, and its meter."""
    config, world, base = run.config, run.world, run.model.base_causallm
    blocks = decoder_blocks(base) if config.activation_checkpointing else countable_blocks(base)
    precision = "bf16" if config.bf16 else "tf32" if config.tf32 else "fp32"
    peak = peak_flops(world.device, precision, config.peak_tflops)
    run.meter = Meter(world.device, Shape.of(base, blocks, frozen=True), None if peak is None else peak * world.size)
    if config.activation_checkpointing:
        recompute_blocks(blocks)
    if config.batch_size_training == "auto":
        micro = config.eval_batch_size or 32 if config.only_eval else choose_micro_batch(run)
        run.config = run.folder.config = config.model_copy(update={"batch_size_training": micro})
    if config.compile and not config.only_eval:
        why_not = "a CPU gains nothing from it (compile: always forces it)"
        if config.compile == "always" or world.device.type == "cuda":
            why_not = compile_passes(run.model, run.precision)
        # One rank that computes differently would be a different model.
        reasons = [reason for reason in world.gather([why_not]) if reason]
        if reasons:
            uncompile(run.model)
        world.print(f"Note: the passes are not compiled: {reasons[0]}" if reasons else "The passes are compiled")


def countable_blocks(base) -> list:
    """What the FLOPs of a model are counted over: its decoder blocks, or where they can't be told all but embeddings."""
    try:
        return list(decoder_blocks(base))
    except ValueError:
        return [m for m in base.base_model.children() if not isinstance(m, torch.nn.Embedding)]


def choose_micro_batch(run: Run) -> int:
    """The micro-batch for `batch_size_training: auto`: that of the run that is resumed, else the largest that fits all ranks."""
    config, world = run.config, run.world
    before = world.from_main(run.folder.micro_batch() if world.is_main and config.auto_resume else None)
    if before is not None:
        return before
    sizes = candidates(config.effective_batch_size, world.size)
    sets = [run.rows(get_cot_latent_dataset, stage, run.train) for stage in (0, config.stage(config.num_epochs - 1))]
    longest = max(sets, key=lambda rows: rows.lengths().total.max())
    numbers = longest.lengths().total.argsort()[::-1]

    def step(n: int) -> None:
        reserved = [torch.empty_like(p) for p in run.model.parameters() for _ in range(2) if p.requires_grad]  # AdamW's
        batch = on_device(host_batch(run, longest, numbers.repeat(n)[:n] if len(numbers) < n else numbers[:n]), world.device)
        with run.precision():
            run.model(**batch).loss.backward()
        run.model.zero_grad(set_to_none=True)
        forget_trials(run.model)
        del reserved

    run.model.train()
    micro = min(world.gather([largest_micro_batch(sizes, step, world.device)]))
    world.print(f"batch_size_training: auto -> {micro} (longest row {longest.lengths().total.max()} tokens)")
    return micro


def find_start(config: Config, world: World, folder: RunFolder):
    """Where this process starts from: (resumed, position, (path, weights) for build_model, what restores the optimizer).

    Where a snapshot's shards are to be read by sharded parameters, path and weights are None.
    """
    found = None
    if config.auto_resume and not config.only_eval and not config.debug:
        found = world.from_main(folder.find_resume() if world.is_main else None)
    if found is not None:
        path, position = found
        if not path.exists():
            raise ValueError(f"save_path: {path}, which rank 0 goes on from, is not on this machine; all must share save_path")
        world.print("Warning: found previous run and gonna resume from that. the inputted `resume` argument is ignored!")
        print(f"Loading from previous run epoch_{position.epoch}!", flush=True)
        if is_snapshot(path):
            weights, restore = read_snapshot(path, config.parallel == "fsdp2")
            source = (given_weights(config, world), None) if config.lora else (None if weights is None else path, weights)
            return True, position, source, restore
        if config.lora:
            raise ValueError(
                f"lora: {path} holds merged weights, and there is no readable last_state with the updates beside it; give this "
                f"run another name and load_model_path: {path}"
            )
        if config.reset_optimizer is not True:
            world.print(f"Warning: no optimizer state beside {path.name}; the optimizer starts fresh")
        return True, position, (path, None), None
    path = given_weights(config, world)
    if config.resume:
        if path is None:
            print(f"Warning: you want to skip the first {config.resume} but you are not loading any existing checkpoint!")
        print(f"Loading from {path} and skip the first {config.resume} epochs", flush=True)
    return False, Position(epoch=config.resume), (path, None), None


def given_weights(config: Config, world: World) -> Path | None:
    """The file that `load_model_path` names."""
    if config.load_model_path is None:
        return None
    return Path(world.from_main(str(find_checkpoint(config.load_model_path)) if world.is_main else None))


def load_data(config: Config, world: World) -> tuple[list[dict], dict[str, TokenTable], dict[str, dict]]:
    """The validation rows, the tokens of each data file by its key (rank 0 first, the others from its cache), and its facts."""
    limits = {"val_path": config.max_val_samples, "train_path": config.max_train_samples}
    if config.debug:
        limits = {"val_path": 32, "train_path": 5000}
    val_rows = load_rows(config.val_path, limits["val_path"])
    wants_two_choice(config, val_rows)  # raises where it can't be done
    tokenizer = backbones.load_tokenizer(config.tokenizer_id)
    if config.markers:
        backbones.add_thought_tokens(tokenizer)
    tables = {}
    for turn in (True, False):
        if world.is_main == turn:
            for key in ["val_path"] if config.only_eval else ["val_path", "train_path"]:
                tables[key] = TokenTable(get_dataset(getattr(config, key), tokenizer, limits[key]))
        world.barrier()
    for key, table in tables.items():
        if table.merges:
            world.print(
                f"Note: in {table.merges} of the first {min(len(table), 1000)} rows of {key} tokens would merge across pieces; "
                "pieces are used"
            )
    return val_rows, tables, {key: data_facts(getattr(config, key), len(table)) for key, table in tables.items()}


def data_facts(path: str, n_rows: int) -> dict:
    """What tells a data file from another: {"file", "sha256", "rows" used}."""
    with open(path, "rb") as file:
        return {"file": path, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "rows": n_rows}


def check_lengths(run: Run) -> None:
    """Refuse, before any compute, a row that would not fit the model's positions at some stage."""
    config, limit = run.config, backbones.max_positions(run.model.base_causallm)
    for key, table in {"val_path": run.val, "train_path": run.train}.items():
        if table is None or limit is None:
            continue
        most_latents = config.max_latent_stage * config.c_thought
        longest = run.rows(get_cot_latent_dataset, 0, table).lengths().total.max() + most_latents
        # Dropped steps make room for latents; only where even this bound is too long are the stages looked at one by one.
        for stage in range(config.max_latent_stage + 2) if longest > limit else ():
            total = run.rows(get_cot_latent_dataset, stage, table).lengths().total
            worst = int(total.argmax())
            if total[worst] > limit:
                raise ValueError(
                    f"{key}: {getattr(config, key)}, row {worst} has {total[worst]} tokens at stage {stage}; "
                    f"{config.model_id} has {limit} positions: leave the row out or use a longer model"
                )


if __name__ == "__main__":
    sys.exit(main())
