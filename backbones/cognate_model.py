"""The Cognate backbone without its head: a windowed trunk, a long-term memory behind a gate, and a recursive refiner.

    ids -> √d E[id] + P[pos] -> L windowed blocks -> y -> memory -> gate -> features -> refiner, step 1 .. R -> answers

    out = CognateModel(CognateConfig())(ids_BC)
    out.last_hidden_state, out.columns["halting_steps"]

Nothing outlives a call but the cache, which holds everything column by column: L layers of the trunk, the trace of the
memory, keys and values of the features and of the answers before each refinement step.

Shape letters: B rows, C new columns, T columns with those in the cache, D width, S = R + 1 refinement steps from 0.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from backbones.cognate_config import CognateConfig
from backbones.halting import HaltingHead
from backbones.long_memory import MEMORIES
from backbones.refiner import Gate, Recursion
from backbones.window import Shelf, Window, attend, grow, heads


class ScaledEmbedding(nn.Embedding):
    """√d E[id]: with rows of length about 1, what comes out has RMS 1, like the states that are fed back as thoughts."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * math.sqrt(self.embedding_dim)


class Attention(nn.Module):
    def __init__(self, config: CognateConfig, layer: int):
        super().__init__()
        D = config.hidden_size
        self.layer, self.n_heads, self.dropout = layer, config.num_attention_heads, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x_BCD: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = (heads(proj(x_BCD), self.n_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        return self.o_proj(attend(q, k, v, mask, self.dropout if self.training else 0.0))


class GatedMlp(nn.Module):
    """W_d (silu(W_g x) * W_u x)"""

    def __init__(self, config: CognateConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(D, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x_BCD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BCD)) * self.up_proj(x_BCD))


class Block(GradientCheckpointingLayer):
    """x += attention(RMS x); x += MLP(RMS x)."""

    def __init__(self, config: CognateConfig, layer: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.attention, self.mlp = Attention(config, layer), GatedMlp(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BCD: Tensor, mask: Tensor | None, past_key_values: Cache | None = None) -> Tensor:
        x_BCD = x_BCD + self.dropout(self.attention(self.attention_norm(x_BCD), mask, past_key_values))
        return x_BCD + self.dropout(self.mlp(self.mlp_norm(x_BCD)))


class CognatePreTrainedModel(PreTrainedModel):
    config_class = CognateConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(module, Attention | GatedMlp):  # the two branches of each block add up
            last = module.o_proj if isinstance(module, Attention) else module.down_proj
            init.normal_(last.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers))


@dataclass
class CognateModelOutput(ModelOutput):
    """`columns`: what each new column has to say besides its state, [B, C, ...]; see `CognateModel.forward`."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    columns: dict[str, Tensor] | None = None


class CognateModel(CognatePreTrainedModel):
    """Everything but the head."""

    def __init__(self, config: CognateConfig):
        super().__init__(config)
        D = config.hidden_size
        self.embed_tokens = ScaledEmbedding(config.vocab_size, D)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.memory = MEMORIES[config.memory_type](config)
        self.gate = Gate(config)
        self.recursion = Recursion(config)
        self.act_head = HaltingHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.embed_tokens = embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_all_steps: bool | None = None,
        **kwargs,
    ) -> CognateModelOutput:
        """Run new columns: ids [B, C] or embeddings [B, C, D], behind those in the cache.

        `attention_mask`: of past and new columns, see `Window`. `position_ids`: [B or 1, C]; default counts real columns.
        `last_hidden_state` enters the head as it is: the answer at each token's halt, also while training (where states
        go on behind the halt, for the losses); without `early_exit` the last answer. `hidden_states`: that one alone, or
        with `output_hidden_states` the embeddings and every block's output before it.

        `columns`: halt_logits [B, C, S], halting_steps [B, C] (1 .. R), gate_entropy, memory_share [B, C]; while training or with
        `return_all_steps` also states [B, C, S, D], the answers as they would enter the head; with `return_all_steps`
        latents [B, C, S, D].
        """
        x = self._embeddings(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        n_past = 0 if cache is None else cache.get_seq_length()
        window = Window(self.config.attention_window, attention_mask, n_past, x.shape[1], x.device)
        x = self.dropout(x + self.embed_positions(self._positions(position_ids, window)))

        per_block = [x]
        for block in self.layers:
            x = block(x, window.mask, past_key_values=cache)
            per_block.append(x)
        y = self.norm(x)
        shelf = Shelf(cache, first=len(self.layers))
        features, gate_entropy, memory_share = self.gate(y, self.memory(y, window, shelf))
        refined = self.recursion(features, window, shelf, self.act_head)

        columns = {
            "halt_logits": refined.halt_logits_BCS,
            "halting_steps": refined.steps_BC,
            "gate_entropy": gate_entropy,
            "memory_share": memory_share,
        }
        if self.training or return_all_steps:
            columns["states"] = torch.stack(refined.answers, 2)
        if return_all_steps:
            columns["latents"] = torch.stack(refined.latents, 2)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return CognateModelOutput(
            last_hidden_state=refined.hidden_BCD,
            past_key_values=cache,
            hidden_states=(*(per_block if wanted else ()), refined.hidden_BCD),
            columns=columns,
        )

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill, with all the layers it needs; None where nothing is kept."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and any(block.gradient_checkpointing for block in self.layers):
            if cache is not None and cache.get_seq_length():
                raise ValueError("gradient checkpointing computes blocks twice, which a cache with columns in it can't take")
            return None
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            R = self.config.max_recursions
            grow(cache, self.config.num_hidden_layers + 1 + (R + 1 if R else 0))
        return cache

    def _positions(self, position_ids: Tensor | None, window: Window) -> Tensor:
        limit = self.config.max_position_embeddings
        if position_ids is None:
            position_ids = (window.count_BC() - 1).clamp(min=0)
            n_columns = window.n_past + window.n_new
            if n_columns <= limit:  # then no position can exceed it, and the device need not be asked
                return position_ids
        elif position_ids.device.type != "cpu":
            return position_ids
        if position_ids.numel() and int(position_ids.max()) >= limit:
            raise ValueError(f"the input needs {int(position_ids.max()) + 1} positions; the model has {limit}")
        return position_ids
