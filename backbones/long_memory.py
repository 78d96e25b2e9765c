"""Long-term memories of the Cognate backbone: a pool of exponential averages, and a Titans memory.

    memory = EmaPool(config)                     # or TitansMemory(config)
    read_BCD = memory(y_BCD, window, shelf)      # what is remembered at each column, of that column and those before it

Both are functions of the sequence alone: no state outlives a call but what the cache holds column by column, padding
neither decays nor writes, and rows don't meet.

Shape letters: B rows, C new columns, P columns before them, T = P + C, D width of the model, m width of the memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.window import Shelf, Window, wide

SHORTEST_HALF_LIFE = 16  # tokens; of the first channel
CHUNK_HALVINGS = 8  # a chunk spans so many of the shortest half-life: weights within it stay below 2**8
FORGET_OFFSET = 4.0  # an untrained Titans memory forgets sigmoid(-4) = 2% a token


def decaying_average(c_BCm: Tensor, log_decay_m: Tensor, real_BC: Tensor | None, past_Bm: Tensor | None, chunk: int) -> Tensor:
    """The trace m_t = λ m_{t-1} + (1-λ) c_t of all columns at once, [B, C, m]; where not real, m_t = m_{t-1}.

    With n_t real columns up to t it is λ^n_t (m_0 + Σ λ^-n_i (1-λ) c_i), a cumulative sum: exact, and done in chunks
    because λ^-n grows. `past_Bm`: m_0 (default 0).
    """
    written = -torch.expm1(log_decay_m) * c_BCm
    if real_BC is not None:
        written = written.masked_fill(~real_BC[..., None], 0)
    traces, last_B1m = [], 0 if past_Bm is None else past_Bm[:, None]
    for start in range(0, c_BCm.shape[1], chunk):
        piece = written[:, start : start + chunk]
        if real_BC is None:
            n = torch.arange(1, piece.shape[1] + 1, device=piece.device)[None, :, None]
        else:
            n = real_BC[:, start : start + chunk].cumsum(1)[..., None]
        log_weight = n * log_decay_m
        traces.append(log_weight.exp() * (last_B1m + ((-log_weight).exp() * piece).cumsum(1)))
        last_B1m = traces[-1][:, -1:]
    return torch.cat(traces, 1)


class EmaPool(nn.Module):
    """Exponential averages of the trunk's states, one a channel, with half-lives from 16 tokens to the config's longest.

    The average is divided by 1 - λ^n, the weight that n tokens have, so that a short sequence reads no faint memory.
    The cache keeps the trace of every column as a key, with a value of no width.
    """

    def __init__(self, config):
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.memory_size, bias=False)
        self.up = nn.Linear(config.memory_size, config.hidden_size, bias=False)
        if config.memory_decay is not None:
            self.half_lives = (math.log(0.5) / math.log(config.memory_decay),) * 2
        else:
            self.half_lives = (SHORTEST_HALF_LIFE, config.memory_half_life)
        self.chunk = max(1, int(CHUNK_HALVINGS * min(self.half_lives)))

    def log_decay(self, like: Tensor) -> Tensor:
        """log λ of every channel, [m]; λ = 2^(-1/τ), half-lives τ evenly spaced on a log scale."""
        shortest, longest = map(math.log2, self.half_lives)
        half_life_m = torch.logspace(shortest, longest, self.down.out_features, 2.0, dtype=like.dtype, device=like.device)
        return -math.log(2) / half_life_m

    def forward(self, y_BCD: Tensor, window: Window, shelf: Shelf) -> Tensor:
        c_BCm = wide(self.down(y_BCD))
        log_decay_m = self.log_decay(c_BCm)
        past_Bm = self._last(shelf.read(c_BCm[:, None])[:, 0], window) if window.n_past else None
        trace_BCm = decaying_average(c_BCm, log_decay_m, window.real_BC, past_Bm, self.chunk)
        shelf.add(trace_BCm[:, None], trace_BCm[:, None, :, :0])
        weight = -torch.expm1(window.count_BC().clamp(min=1)[..., None] * log_decay_m)
        return self.up((trace_BCm / weight).to(y_BCD.dtype))

    @staticmethod
    def _last(past_BPm: Tensor, window: Window) -> Tensor:
        """The trace [B, m] of each row's last past column; where the mask hides columns, of the last that it shows."""
        if window.real_BT is None:
            return past_BPm[:, -1]
        real_BP = window.real_BT[:, : window.n_past]
        last_B = (real_BP * torch.arange(1, window.n_past + 1, device=real_BP.device)).argmax(1)
        return past_BPm[torch.arange(len(last_B), device=last_B.device), last_B]


class TitansMemory(nn.Module):
    """A linear associative memory for each sequence that learns as it reads (Titans, arXiv 2501.00663).

    With keys, values and queries of unit length, error e_t = M_{t-1} k_t - v_t and surprise |e_t|:

        S_t = η_t S_{t-1} - θ_t 2 e_t k_tᵀ          θ_t = 0 where the surprise is not above `surprise_threshold`
        M_t = (1 - α_t) M_{t-1} + S_t               read: M_t q_t

    M_0 = S_0 = 0; η, θ, α depend on the token. M is m x m a token, far too much to cache, and it can't be undone, so the
    cache keeps what it reads instead (y of every column, as a key), and a later call reads all of it again: exact, but
    a loop over all T columns. Training keeps a few [B, m, m] a column for the backward pass.
    """

    def __init__(self, config):
        super().__init__()
        D, m = config.hidden_size, config.memory_size
        self.key, self.value, self.query = (nn.Linear(D, m, bias=False) for _ in range(3))
        self.rates = nn.Linear(D, 3)
        self.up = nn.Linear(m, D, bias=False)
        self.threshold = config.surprise_threshold

    def forward(self, y_BCD: Tensor, window: Window, shelf: Shelf) -> Tensor:
        y_BTD = shelf.add(y_BCD[:, None], y_BCD[:, None, :, :0])[0][:, 0]
        k, v, q = (F.normalize(wide(proj(y_BTD)), dim=-1) for proj in (self.key, self.value, self.query))
        eta, theta, alpha = wide(self.rates(y_BTD)).unbind(-1)
        eta, theta, alpha = eta.sigmoid(), theta.sigmoid(), (alpha - FORGET_OFFSET).sigmoid()
        B, T, m = k.shape
        M = S = k.new_zeros(B, m, m)
        reads = []
        for t in range(T):
            error = (M @ k[:, t, :, None])[..., 0] - v[:, t]
            written = theta[:, t] * (error.norm(dim=-1) > self.threshold)
            S_t = eta[:, t, None, None] * S - 2 * (written[:, None] * error)[..., None] * k[:, t, None]
            M_t = (1 - alpha[:, t])[:, None, None] * M + S_t
            if window.real_BT is not None:
                real = window.real_BT[:, t, None, None]
                M_t, S_t = torch.where(real, M_t, M), torch.where(real, S_t, S)
            M, S = M_t, S_t
            if t >= window.n_past:
                reads.append((M @ q[:, t, :, None])[..., 0])
        return self.up(torch.stack(reads, 1).to(y_BCD.dtype))


MEMORIES = {"ema": EmaPool, "titans": TitansMemory}
