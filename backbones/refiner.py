"""What the Cognate backbone does behind its trunk: a gate mixes trunk and memory, and a small network refines the mix.

    features_BCD, entropy_BC, memory_share_BC = Gate(config)(y_BCD, memory_BCD)
    refined = Recursion(config)(features_BCD, window, shelf, halting_head)
    refined.hidden_BCD            # the answer of each token at its own halt: what enters the language-model head

The refiner reads features and answers of the columns it may see (Tiny Recursive Model, arXiv 2510.04871, made causal),
and each token halts by itself. In evaluation tokens that have halted cost nothing: only the others are gathered.

Shape letters: B rows, C new columns, D width, H heads, A columns a row that go on, R refinement steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.halting import HaltingHead, binary_entropy
from backbones.window import Shelf, Window, attend, heads, rms, wide


class Gate(nn.Module):
    """F = g ŷ + (1 - g) m̂ of the normalised states and memories, g = σ(W₂ relu(W₁ [ŷ, m̂])) a channel."""

    def __init__(self, config):
        super().__init__()
        D, self.eps = config.hidden_size, config.rms_norm_eps
        self.inner = nn.Linear(2 * D, config.gate_size)
        self.outer = nn.Linear(config.gate_size, D)

    def forward(self, y_BCD: Tensor, memory_BCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mix [B, C, D]; of a token's gates the mean entropy in nats, and the mean share left to the memory, [B, C] each."""
        y_BCD, memory_BCD = rms(y_BCD, self.eps), rms(memory_BCD, self.eps)
        logit_BCD = self.outer(F.relu(self.inner(torch.cat([y_BCD, memory_BCD], -1))))
        g_BCD = logit_BCD.sigmoid()
        entropy_BC = binary_entropy(wide(logit_BCD)).mean(-1)
        return g_BCD * y_BCD + (1 - g_BCD) * memory_BCD, entropy_BC, (1 - wide(g_BCD)).mean(-1).detach()


class Reader(nn.Module):
    """Multi-head attention with biases, whose keys and values are made apart from its queries."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.n_heads, self.dropout = config.refiner_heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def keys_values(self, x_BCD: Tensor) -> tuple[Tensor, Tensor]:
        return heads(self.k_proj(x_BCD), self.n_heads), heads(self.v_proj(x_BCD), self.n_heads)

    def forward(self, x_BCD: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        queries = heads(self.q_proj(x_BCD), self.n_heads)
        return self.o_proj(attend(queries, *keys_values, mask, self.dropout if self.training else 0.0))


class Mixer(nn.Module):
    """x <- LN(x + MLP[x, others]), the MLP with ReLU from n widths over two to one."""

    def __init__(self, config, n_inputs: int):
        super().__init__()
        D = config.hidden_size
        self.inner, self.outer = nn.Linear(n_inputs * D, 2 * D), nn.Linear(2 * D, D)
        self.norm, self.dropout = nn.LayerNorm(D), nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.outer(F.relu(self.inner(torch.cat([x, *others], -1))))))


class Refiner(nn.Module):
    """One micro step of the latent state: z <- LN(z + MLP[z, attention to features, attention to answers])."""

    def __init__(self, config):
        super().__init__()
        self.read_features, self.read_answers = Reader(config), Reader(config)
        self.mix = Mixer(config, 3)

    def forward(self, z_BCD: Tensor, features, answers, mask: Tensor | None) -> Tensor:
        """`features`, `answers`: keys and values of all columns so far; `mask` of the columns in z."""
        return self.mix(z_BCD, self.read_features(z_BCD, features, mask), self.read_answers(z_BCD, answers, mask))


@dataclass(frozen=True)
class Refined:
    """What the recursion made of the new columns; lists run over steps 0 .. R."""

    hidden_BCD: Tensor
    answers: list[Tensor]  # [B, C, D], scaled as they would enter the head
    latents: list[Tensor]  # [B, C, D]
    halt_logits_BCS: Tensor  # S = R + 1; that of step 0 halts nothing
    steps_BC: Tensor  # at which step the token halts, 1 .. R (0 where R = 0)


class Recursion(nn.Module):
    """z₀ = W_z F, y₀ = W_y z₀; then R times: `micro_steps` of the refiner on z, and y <- LN(y + MLP[y, z])."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.to_latent, self.to_answer = nn.Linear(D, D), nn.Linear(D, D)
        self.refiner, self.updater = Refiner(config), Mixer(config, 2)

    def forward(self, features_BCD: Tensor, window: Window, shelf: Shelf, halting: HaltingHead) -> Refined:
        """Refine until each token's halt, or to the last step in training and without `early_exit`.

        While training, states go on behind a token's halt; its `hidden` is the answer at its halt all the same. Without
        `early_exit` (or `use_act`) it is the last answer.
        """
        config, R = self.config, self.config.max_recursions
        frees = config.use_act and config.early_exit  # whether the answer at the halt counts
        skips = frees and not self.training
        z = self.to_latent(features_BCD)
        y = self.to_answer(z)
        going = window.real_BC
        if going is None:
            going = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        hidden, latents, answers, logits = y, [z], [y], [halting(z)]
        unhalted, steps = torch.ones_like(wide(logits[0])), torch.zeros_like(going, dtype=torch.long)
        features = shelf.add(*self.refiner.read_features.keys_values(features_BCD)) if R else None
        any_going, of_answers, keys_values = True, None, None
        for n in range(1, R + 1):
            if not any_going and shelf.cache is None:
                break
            if config.detach_between_steps and n > 1:
                z, y = z.detach(), y.detach()
            if of_answers is not y:  # of answers that stay, keys and values stay too
                of_answers, keys_values = y, self.refiner.read_answers.keys_values(y)
            seen = shelf.add(*keys_values)
            if not skips:
                z, y = self._step(z, y, features, seen, window.mask)
            elif any_going:
                z, y = self._step_some(going, z, y, features, seen, window)
            hidden = torch.where(going[..., None], y, hidden) if frees else y
            latents, answers, logits = [*latents, z], [*answers, y], [*logits, halting(z)]
            steps = steps + going
            unhalted = unhalted * (-wide(logits[-1])).sigmoid()
            if config.use_act:
                going = going & (1 - unhalted < config.halt_threshold)
            any_going = not skips or n == R or bool(going.any())
        missing = R + 1 - len(answers)
        answers, latents, logits = (x + x[-1:] * missing for x in (answers, latents, logits))
        eps = config.rms_norm_eps
        return Refined(
            rms(hidden, eps), [rms(a, eps) for a in answers], latents, torch.stack(logits, -1), steps.clamp(min=min(R, 1))
        )

    def _step(self, z: Tensor, y: Tensor, features, answers, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        for _ in range(self.config.micro_steps):
            z = self.refiner(z, features, answers, mask)
        return z, self.updater(y, z)

    def _step_some(self, going_BC: Tensor, z_BCD: Tensor, y_BCD: Tensor, features, answers, window: Window):
        """`_step` for the columns that go on; the others keep their states."""
        n_most = int(going_BC.sum(1).max())
        if n_most == going_BC.shape[1]:
            stepped = self._step(z_BCD, y_BCD, features, answers, window.mask)
        else:
            # The columns of each row that go on, first ones first; rows with fewer are filled up with others.
            order_BA = going_BC.int().argsort(dim=1, descending=True, stable=True)[:, :n_most]
            index_BAD = order_BA[..., None].expand(-1, -1, z_BCD.shape[-1])
            picked = self._step(
                z_BCD.gather(1, index_BAD), y_BCD.gather(1, index_BAD), features, answers, window.rows(order_BA)
            )
            stepped = (old.to(new.dtype).scatter(1, index_BAD, new) for old, new in zip((z_BCD, y_BCD), picked))
        return tuple(torch.where(going_BC[..., None], new, old) for new, old in zip(stepped, (z_BCD, y_BCD)))
