"""What a run watches besides its loss: alarms on its own records, and what its model does on validation rows.

alarms = Alarms(enabled=True)
alarms.update(step, loss, grad_norm)             # warnings as lines; FloatingPointError where it must not go on
alarms.evaluation(epoch, loss)
observed(run, stage)                             # {"thought/rms": 1.0, "embedding/rms": 0.14, "act/q_variance": 0.08, ...}
"""

import math
from collections.abc import Callable

import torch

from dataset import get_cot_latent_dataset

OBSERVED_ROWS = 32


class Alarms:
    """Says once each, and again after it was quiet, what usually means that a run has gone wrong.

    Steps: the running mean of the loss (decay 0.99) above 1.2 times its minimum for 200 updates; a gradient norm above 10.
    Validations: a loss above the best by 0.05 twice in a row; two losses equal to four decimals; one below 0.05 after the
    first epoch, which text does not have (a model that sees what it is asked does). FloatingPointError for a norm above 50.
    """

    DECAY, ROSE, PATIENCE = 0.99, 1.2, 200
    HIGH_NORM, ABORT_NORM = 10.0, 50.0
    WORSE, TOO_GOOD = 0.05, 0.05

    def __init__(self, enabled: bool, say: Callable[[str], object] = print):
        self.enabled, self.say = enabled, say
        self.loss_ema: float | None = None
        self.lowest, self.high_for = math.inf, 0
        self.ringing: set[str] = set()
        self.losses: list[float] = []

    def update(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at an update's loss and its gradient norm before clipping."""
        self.loss_ema = loss if self.loss_ema is None else self.DECAY * self.loss_ema + (1 - self.DECAY) * loss
        self.lowest = min(self.lowest, self.loss_ema)
        self.high_for = self.high_for + 1 if self.loss_ema > self.ROSE * self.lowest else 0
        rose = f"running mean of the loss {self.loss_ema:.4f} is above {self.ROSE} x its minimum for {self.PATIENCE} updates"
        high = f"gradient norm {grad_norm:.3g} is above"
        self._ring("loss", self.high_for >= self.PATIENCE, f"update {step}: {rose}")
        self._ring("norm", grad_norm > self.HIGH_NORM, f"update {step}: {high} {self.HIGH_NORM:g}")
        if self.enabled and grad_norm > self.ABORT_NORM:
            remedy = "lower lr or muon_lr, or set alarms: False"
            raise FloatingPointError(f"{high} {self.ABORT_NORM:g} at update {step}: {remedy}")

    def evaluation(self, epoch: int, loss: float) -> None:
        """Look at the validation loss of an epoch (index)."""
        best, before = min(self.losses, default=math.inf), self.losses[-1:]
        where = f"validation after epoch {epoch + 1}: loss {loss:.4f}"
        worse = loss > best + self.WORSE and bool(before) and before[0] > best + self.WORSE
        equal, good = [round(x, 4) for x in before] == [round(loss, 4)], epoch == 0 and loss < self.TOO_GOOD
        self._ring("worse", worse, f"{where} is above the best, {best:.4f}, by more than {self.WORSE} for the second time")
        self._ring("equal", equal, f"{where} is that of the one before to four decimals")
        self._ring("good", good, f"{where} is too low for one epoch: do tokens see their successors?")
        self.losses.append(loss)

    def _ring(self, name: str, wrong: bool, message: str) -> None:
        if not wrong:
            self.ringing.discard(name)
        elif name not in self.ringing and self.enabled:
            self.ringing.add(name)
            self.say(f"Warning: {message}")


@torch.no_grad()
def observed(run, stage: int) -> dict[str, float]:
    """What the model does on the first validation rows in their training form, under the keys of metrics.jsonl.

    Of models whose thoughts are fed-back states the root mean square of these, and of the embeddings; and what the backbone
    says itself (`statistics(columns, asked_BT, thought_BT, real_BT)`, where it has one).
    """
    base, model = run.model.base_causallm, run.model
    feeds, says = model.feedback.reads_hidden, getattr(base, "statistics", None)
    if not feeds and says is None:
        return {}
    rows = run.rows(get_cot_latent_dataset, stage, run.val)
    batch = rows.batch(range(min(OBSERVED_ROWS, len(rows))), run.tokenizer.pad_token_id)
    batch.pop("idx")
    plan = model.plan(**batch).to(run.world.device)
    batch = {key: value.to(run.world.device) for key, value in batch.items()}
    labels_BT, ids_BT, real_BT = batch.pop("labels"), batch["input_ids"], batch["attention_mask"].bool()
    was_training = model.training
    with run.precision():
        rollout = model.eval().rollout(**batch, plan=plan)
    model.train(was_training)
    thought_BT = ids_BT == (-1 if model.latent_token_id is None else model.latent_token_id)
    found = {}
    if feeds and thought_BT.any():
        found["thought/rms"] = float(rollout.inputs_embeds_BTD[thought_BT].float().square().mean().sqrt())
        found["embedding/rms"] = float(model.embedding_rms())
    if says is not None:
        found |= says(rollout.columns, labels_BT != -100, thought_BT, real_BT)
    return found
