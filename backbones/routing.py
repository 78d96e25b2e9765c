"""Mixture of Depths (arXiv 2404.02258): which tokens a block computes, and which pass it by unchanged.

    router = Router(width=256, capacity=0.125)              # "threshold": causal, its own state decides
    route = router(x_BCD, real_BC)                          # Route(selected [B, C], gate [B, C], scores [B, C], ...)
    out_BCD = x + (route.gate * route.selected)[..., None] * (block(x) - x)
    router.note(route.scores, real_BC)                      # in training
    router.after_update(gather)                             # once an optimizer step: the threshold follows the scores

A score is r = w.x + b. Three ways to select by it:

- "threshold": r > theta, where theta is a buffer that follows the quantile of the scores seen in training. It depends on the
  token's own state and on constants alone, so it is the same with a cache, in chunks and in any batch.
- "predictor": the best of each row while training on whole rows; with a cache or in evaluation a small network that has
  learned to guess that choice from the token alone.
- "topk": the best of each row, always. That looks at later tokens, so it is for baselines that run whole rows.

Shape letters: B rows, C columns, D width, M routed layers, S selected tokens, N slots of the row with most of them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTERS = ("threshold", "predictor", "topk")
KINDS = ("question", "thought", "text")  # of tokens, by number
MOST_PENDING = 2**24  # scores kept for a quantile where nobody calls `after_update`


class Route(NamedTuple):
    """What a router decided about the columns of one pass."""

    selected: Tensor  # bool [B, C], never true at padding
    gate: Tensor  # [B, C] in 0..1, carries the router's gradient; counts where selected
    scores: Tensor  # [B, C], without gradient
    predicted: Tensor | None = None  # [B, C], the predictor's logits


class Router(nn.Module):
    """Scores tokens and selects about `capacity` of them; see the module's docstring for `kind`.

    `decay` is that of the threshold's moving average. Scores are float32 or wider whatever the model's dtype, so that
    a rounding does not send a token another way.
    """

    def __init__(self, width: int, capacity: float, kind: str = "threshold", decay: float = 0.98):
        super().__init__()
        self.capacity, self.kind, self.decay = capacity, kind, decay
        self.score = nn.Linear(width, 1)
        self.predictor = None
        if kind == "predictor":
            self.predictor = nn.Sequential(nn.Linear(width, width // 4), nn.SiLU(), nn.Linear(width // 4, 1))
        self.threshold: Tensor | None
        self.register_buffer("threshold", torch.zeros(()) if kind == "threshold" else None)
        self._pending: list[tuple[Tensor, Tensor | None]] = []

    def forward(
        self, x_BCD: Tensor, real_BC: Tensor | None = None, forced_BC: Tensor | None = None, cached: bool = False
    ) -> Route:
        """Decide about [B, C, D] states. `real_BC` is false at padding (None: there is none), `forced_BC` true where a token
        is selected whatever its score; `cached`: the row goes on in other passes."""
        wide = torch.promote_types(x_BCD.dtype, torch.float32)
        with torch.autocast(x_BCD.device.type, enabled=False):
            margin_BC = F.linear(x_BCD.to(wide), self.score.weight.to(wide), self.score.bias.to(wide))[..., 0]
        scores_BC, predicted_BC = margin_BC.detach(), None
        if self.predictor is not None:
            predicted_BC = self.predictor(x_BCD.detach())[..., 0]
        if self.kind == "threshold":
            margin_BC = margin_BC - self.threshold
            selected_BC = margin_BC > 0
        elif self.kind == "predictor" and (cached or not self.training):
            selected_BC = predicted_BC > 0
        else:
            selected_BC = expert_choice(scores_BC, real_BC, self.capacity)
        if forced_BC is not None:
            selected_BC = selected_BC | forced_BC.bool()
        if real_BC is not None:
            selected_BC = selected_BC & real_BC
        return Route(selected_BC, margin_BC.sigmoid(), scores_BC, predicted_BC)

    # ------------------------------------------------------------ the threshold

    def note(self, scores_BC: Tensor, real_BC: Tensor | None) -> None:
        """Keep the scores of a training forward for the next `after_update`."""
        if self.kind != "threshold":
            return
        # Padding is taken out once an update, since that waits for the device; a copy, since compiled passes reuse memory.
        self._pending.append((scores_BC.detach().clone(), real_BC))
        while len(self._pending) > 1 and sum(scores.numel() for scores, _ in self._pending) > MOST_PENDING:
            self._pending.pop(0)

    def forget(self) -> None:
        """Drop the scores seen since the last update, as after a trial step that was not training."""
        self._pending.clear()

    @torch.no_grad()
    def after_update(self, gather=lambda scores_N: scores_N) -> None:
        """Move the threshold towards the (1 - capacity)-quantile of the scores of real tokens since the last call.

        `gather`: this process's scores (1-D on the CPU, maybe none) -> those of all processes. Without any score nothing
        changes.
        """
        if self.kind != "threshold":
            return
        seen = [scores.flatten() if real is None else scores[real] for scores, real in self._pending]
        self._pending.clear()
        scores_N = gather((torch.cat(seen) if seen else self.threshold.new_empty(0)).cpu())
        if len(scores_N):
            self.threshold.lerp_(upper_quantile(scores_N, self.capacity).to(self.threshold), 1 - self.decay)


def upper_quantile(scores_N: Tensor, capacity: float) -> Tensor:
    """The score that `capacity` of the scores exceed: floor(capacity * N) of them where no two are equal."""
    n = len(scores_N)
    return scores_N.kthvalue(max(n - math.floor(capacity * n + 1e-6), 1)).values


def expert_choice(scores: Tensor, real_BC: Tensor | None, capacity: float) -> Tensor:
    """The ceil(capacity * tokens) best of each row: bool like `scores` ([B, C] or [B, C, M]). Looks at the whole row."""
    real = scores.new_ones(scores.shape[:2], dtype=torch.bool) if real_BC is None else real_BC
    real = real[..., None] if scores.ndim == 3 else real
    n_chosen = (capacity * real.sum(1, keepdim=True) - 1e-6).ceil()
    rank = scores.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < n_chosen) & real


def predictor_loss(columns: dict[str, Tensor], real_BC: Tensor | None, capacity: float) -> Tensor:
    """Mean cross-entropy of the predictors' guesses ("mod_predicted") of who is among the best of a row ("mod_scores").

    Both [B, C, M] over whole rows: the columns of all passes joined.
    """
    chosen_BCM = expert_choice(columns["mod_scores"], real_BC, capacity)
    loss_BCM = F.binary_cross_entropy_with_logits(
        columns["mod_predicted"], chosen_BCM.to(columns["mod_predicted"].dtype), reduction="none"
    )
    if real_BC is None:
        return loss_BCM.mean()
    return (loss_BCM * real_BC[..., None]).sum() / (real_BC.sum() * loss_BCM.shape[2]).clamp(min=1)


# ---------------------------------------------------------------- computing selected tokens only


class Picked(NamedTuple):
    """Where the selected tokens of a batch stand, and where their queries stand in rows of equal length."""

    flat_S: Tensor  # number in B * C
    place_S: Tensor  # number in B * N
    column_BN: Tensor  # column of each slot; 0 where a row has fewer

    @classmethod
    def of(cls, selected_BC: Tensor) -> "Picked":
        """Finds them, which waits for the device. N is at least 1."""
        B, C = selected_BC.shape
        flat_S = selected_BC.flatten().nonzero()[:, 0]
        count_BC = selected_BC.cumsum(1)
        n_slots = max(int(count_BC[:, -1].max()), 1)
        row_S, column_S = flat_S // C, flat_S % C
        place_S = row_S * n_slots + count_BC.flatten()[flat_S] - 1
        column_BN = flat_S.new_zeros(B * n_slots).index_copy(0, place_S, column_S).view(B, n_slots)
        return cls(flat_S, place_S, column_BN)


# ---------------------------------------------------------------- what was routed


def token_kinds(input_ids: Tensor, latent_id: int, end_id: int) -> Tensor:
    """The kind of each token (a number of `KINDS`, [B, T]): thoughts; the question before the end marker; text from it on."""
    after = (input_ids == end_id).cumsum(1) > 0
    kinds = torch.where(after, KINDS.index("text"), KINDS.index("question"))
    return kinds.masked_fill(input_ids == latent_id, KINDS.index("thought"))


def routing_rates(selected_BCM: Tensor, kinds_BC: Tensor, real_BC: Tensor | None = None) -> dict[str, Tensor]:
    """The share of selected tokens in each routed layer ([M]) by kind of token, and of "all"; NaN where there is none."""
    real_BC = torch.ones_like(kinds_BC, dtype=torch.bool) if real_BC is None else real_BC.bool()
    groups = {kind: real_BC & (kinds_BC == number) for number, kind in enumerate(KINDS)} | {"all": real_BC}
    return {name: selected_BCM[of_kind].double().mean(0) for name, of_kind in groups.items()}
