"""`checkpoint_format: phase1`: one file an epoch with all that training needs, and best_model.pt; Cognate's users know it.

    torch.load("checkpoints/phase1/reasoning/best_model.pt", map_location="cpu", weights_only=True)["model_state_dict"]

`<save_path>/<name>/` then holds, instead of checkpoint_N and state_N,

    epoch_N.pt       after N epochs: model_state_dict (the weights that are validated: their average, where one is kept),
                     raw_model_state_dict and optimizer_state_dict (which training goes on from), epoch, global_step,
                     best_val_loss (None before the first validation), config (a plain dict), position, average
    best_model.pt    the same of the best validated epoch
    best_model/      its weights as `save_pretrained` writes them, with the tokenizer: a folder for `model_id:`

Every value is a tensor or a plain one, so that `torch.load` with its defaults reads the files.
"""

import shutil
from itertools import islice
from pathlib import Path

from checkpoint import PHASE1_BEST, PHASE1_EPOCH, numbered_checkpoints, read_whole, save_whole
from coconut import Coconut
from files import read_json, remove, write_json
from run_folder import PHASE1_KEYS, Position, RunFolder


class Phase1Folder(RunFolder):
    """A run folder with the files of this format."""

    names = ("epoch_{}.pt",)
    one_file = True

    def numbers(self) -> list[int]:
        return numbered_checkpoints(self.path, PHASE1_EPOCH)

    def save_epoch(self, position: Position, weights: dict, state: dict) -> None:
        """Write epoch_N.pt. `weights`: those to validate; `state`: of `run_folder.training_state`."""
        stored = {"model_state_dict": weights} | {key: state[own] for key, own in PHASE1_KEYS.items()}
        stored |= {key: state[key] for key in ("average",) if key in state}
        facts = {"epoch": position.epoch, "global_step": position.global_step, "best_val_loss": self._best_loss()}
        stored |= facts | {"config": self.config.model_dump(), "position": dict(vars(position))}
        save_whole(stored, self.path / f"epoch_{position.epoch}.pt")

    def find_resume(self) -> tuple[Path, Position] | None:
        """The newest undamaged epoch_N.pt, or a last_state that is further."""
        epochs = self.readable(self.path / f"epoch_{n}.pt" for n in reversed(self.numbers()))
        found = [*islice(epochs, 1), *self.readable(self.snapshots())]
        path, position = max(found, key=lambda c: (c[1].epoch, c[1].step), default=(None, None))
        self.resumed_from = path and path.name
        return path and (path, position)

    def note_best(self, record: dict, loss: float | None, model: Coconut) -> None:
        """Write best_model.pt, the folder best_model, and at last best.json, which names the file."""
        base = model.base_causallm
        state = read_whole(self.path / f"epoch_{record['epoch'] + 1}.pt")
        save_whole(state | {"best_val_loss": loss}, self.path / PHASE1_BEST)
        weights = {key.removeprefix("base_causallm."): value for key, value in state["model_state_dict"].items()}
        weights = {key: weights[key] for key in base.state_dict()}
        temporary, target = self.path / ".tmp-best_model", self.path / "best_model"
        shutil.rmtree(temporary, ignore_errors=True)
        base.save_pretrained(temporary, state_dict=weights)
        self.tokenizer.save_pretrained(temporary)
        remove(target)
        temporary.rename(target)
        write_json(self.path / "best.json", {"file": PHASE1_BEST} | record | {"loss": loss})

    def _best_loss(self) -> float | None:
        file = self.path / "best.json"
        return read_json(file, "loss")["loss"] if file.is_file() else None
