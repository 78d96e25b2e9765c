"""When tokens halt, and what training asks of that: the halting head, its losses, and cross-entropy in chunks.

    head = HaltingHead(config)
    logit_BC = head(z_BCD)                                 # λ_n = sigmoid(logit of step n)
    p_NR = halting_log_probs(logits_NR).exp()              # of halting at step 1 .. R; the last step halts all
    loss_NS, correct_NS = step_cross_entropy(states_NSD, head_weight_VD, targets_N)

Losses are computed in float32 or wider, from logits.

Shape letters: N labelled positions, S = R + 1 steps from 0, R steps from 1, B rows, T columns, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.window import wide

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32
TARGET_VARIANCE = 0.1
EMA_DECAY = 0.98


class HaltingHead(nn.Module):
    """One logit a token, and the losses of `act_loss: bce`.

    With `act_target: ema` it also keeps the accuracy of every step (`step_accuracy`, [R + 1]), updated by `update`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.logit = nn.Linear(config.hidden_size, 1)
        if config.act_target == "ema":
            self.register_buffer("step_accuracy", torch.zeros(config.max_recursions + 1))

    def forward(self, z: Tensor) -> Tensor:
        """[..., D] -> [...]"""
        return self.logit(z)[..., 0]

    def compute_act_loss(self, q: Tensor, step: int, is_correct: Tensor | None = None) -> Tensor:
        """BCE(q, target) - 0.001 H(q) + the diversity hinge of the halting probabilities at one step: a scalar.

        `q`: [B, T] or [B, T, 1]. `is_correct`: what q should be, [B], [B, T] or [B, T, 1] (default: 0.5 everywhere); under
        `act_target: ema` instead its mean is compared with the accuracy kept for `step`.
        """
        q_BT = wide(q).flatten(1)
        logit_BT = q_BT.logit(eps=torch.finfo(q_BT.dtype).eps)
        if is_correct is None:
            target_BT = torch.full_like(q_BT, 0.5)
        elif self.config.act_target == "ema":
            target_BT = (is_correct.float().mean() > self.step_accuracy[step]).to(q_BT).expand_as(q_BT)
        else:
            target_BT = is_correct.to(q_BT).flatten(1) if is_correct.ndim > 1 else is_correct.to(q_BT)[:, None]
            target_BT = target_BT.expand_as(q_BT)
        real_BT = torch.ones_like(q_BT, dtype=torch.bool)
        return F.binary_cross_entropy_with_logits(logit_BT, target_BT) + self.spread(logit_BT, real_BT)

    def spread(self, logit_BT: Tensor, real_BT: Tensor) -> Tensor:
        """- 0.001 H(q) and the hinge on the variance of q within sequences, over real tokens."""
        q_BT, n = logit_BT.sigmoid(), real_BT.sum().clamp(min=1)
        entropy = (binary_entropy(logit_BT) * real_BT).sum() / n
        mean_B1 = (q_BT * real_BT).sum(1, keepdim=True) / real_BT.sum(1, keepdim=True).clamp(min=1)
        variance = ((q_BT - mean_B1).square() * real_BT).sum() / n
        hinge = self.config.act_diversity_weight * (TARGET_VARIANCE - variance).clamp(min=0)
        return hinge - self.config.act_entropy_weight * entropy

    def gain_targets(self, loss_NS: Tensor, correct_NS: Tensor) -> Tensor:
        """What q should be at steps 1 .. R, [N, R]: 1 where no later step lowers the loss by more than `act_delta`."""
        if self.config.act_target == "ema":
            better_S = correct_NS.float().mean(0) > self.step_accuracy
            return better_S[1:].to(loss_NS).expand(len(loss_NS), -1)
        loss_NR = loss_NS[:, 1:].detach()
        best_later_NR = loss_NR.flip(1).cummin(1).values.flip(1)[:, 1:]
        no_gain_NR = (loss_NR[:, :-1] - best_later_NR <= self.config.act_delta).to(loss_NR)
        return F.pad(no_gain_NR, (0, 1), value=1.0)

    @torch.no_grad()
    def update(self, n_correct_S: Tensor, n: Tensor) -> None:
        """Move the kept accuracies towards those of the latest update."""
        self.step_accuracy.lerp_((n_correct_S / n.clamp(min=1)).to(self.step_accuracy), 1 - EMA_DECAY)


def binary_entropy(logit: Tensor) -> Tensor:
    """Entropy in nats of a coin with this logit."""
    return F.softplus(logit) - logit * logit.sigmoid()


def halting_log_probs(logits_R: Tensor) -> Tensor:
    """log p_n of halting at step n = 1 .. R (last dimension): λ_n Π_{j<n} (1 - λ_j), with λ_R = 1."""
    go_on_R = F.logsigmoid(-logits_R).cumsum(-1)
    before_R = F.pad(go_on_R[..., :-1], (1, 0))
    halt_R = F.pad(F.logsigmoid(logits_R)[..., :-1], (0, 1))
    return before_R + halt_R


def divergence_from_prior(logits_R: Tensor, prior: float) -> Tensor:
    """KL(p || geometric distribution with parameter `prior`, cut off behind step R), over the last dimension."""
    log_p_R = halting_log_probs(logits_R)
    step_R = torch.arange(logits_R.shape[-1], device=logits_R.device, dtype=logits_R.dtype)
    log_prior_R = torch.log_softmax(step_R * torch.log1p(-step_R.new_tensor(prior)), -1)
    return (log_p_R.exp() * (log_p_R - log_prior_R)).sum(-1)


def step_cross_entropy(states_NSD: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every step and whether its first choice is right, [N, S] each.

    Above `LOGITS_AT_ONCE` logits in chunks, which the backward pass computes again.
    """
    N, S, _ = states_NSD.shape
    states, targets = states_NSD.flatten(0, 1), targets_N.repeat_interleave(S)
    n_at_once = max(1, LOGITS_AT_ONCE // len(weight_VD))
    if len(states) <= n_at_once:
        loss, correct = _cross_entropy(states, weight_VD, targets)
    else:
        pieces = zip(states.split(n_at_once), targets.split(n_at_once))
        done = [checkpoint(_cross_entropy, piece, weight_VD, target, use_reentrant=False) for piece, target in pieces]
        loss, correct = (torch.cat(parts) for parts in zip(*done))
    return loss.view(N, S), correct.view(N, S)


def _cross_entropy(states_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    logits_MV = wide(F.linear(states_MD, weight_VD))
    return F.cross_entropy(logits_MV, targets_M, reduction="none"), logits_MV.detach().argmax(-1) == targets_M
