"""LAHR (latent adaptive hierarchical reasoning): a pre-norm decoder with token skipping and a learned memory, each optional.

    config = LahrConfig.size("tiny", vocab_size=100, use_mod=True, use_memory=True)
    model = AutoModelForCausalLM.from_config(config)      # an ordinary Hugging Face causal LM
    model = Coconut(model, ...)                           # the third part, feedback, is the wrapper's

    block       u = x + Attention(RMS(x));  v = u + SwiGLU(RMS(u)), in some blocks with a memory beside or in place of SwiGLU
    skipping    x + g (v - x) for selected tokens, x for the others, in some blocks

The parts: lahr_config.py, lahr_blocks.py, routing.py (who is selected), memory_layers.py.

Shape letters: B rows, C columns of a pass, T columns with those before it, D width, V vocabulary, R routed layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from backbones.lahr_blocks import HIDDEN, Columns, LahrBlock, attention_bias
from backbones.lahr_config import LahrConfig, drawn
from backbones.memory_layers import ValueTable
from backbones.routing import KINDS, Route, Router, predictor_loss, routing_rates

GATHER_FROM = 32  # columns of a pass from which a device other than the CPU gathers: it has to wait for the number of tokens


@dataclass
class LahrOutput(BaseModelOutputWithPast):
    """`columns`: "mod_selected" (bool), "mod_scores", with predictors "mod_predicted", each [B, C, R]; None without routing."""

    columns: dict[str, Tensor] | None = None


@dataclass
class LahrCausalOutput(CausalLMOutputWithPast):
    """With the `columns` of `LahrOutput`."""

    columns: dict[str, Tensor] | None = None


class LahrPreTrainedModel(PreTrainedModel):
    """Configuration and initialisation."""

    config_class = LahrConfig
    base_model_prefix = "model"
    _no_split_modules = ["LahrBlock"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        seed = self.config.init_seed
        names = {} if seed is None else {id(m): name for name, m in self.named_modules()}
        for name, parameter in module.named_parameters(recurse=False):
            init.copy_(parameter, drawn(self.config, module, names.get(id(module), ""), name, seed))
        if isinstance(module, Router) and module.threshold is not None:
            init.zeros_(module.threshold)


class LahrModel(LahrPreTrainedModel):
    """The decoder without its head. States it returns are after the final norm."""

    def __init__(self, config: LahrConfig):
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        learned = config.position_type == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LahrBlock(config, layer) for layer in range(config.num_hidden_layers))
        router = (width, config.mod_capacity, config.mod_router, config.mod_threshold_decay)
        self.routers = nn.ModuleDict({str(layer): Router(*router) for layer in config.routed})
        table = (config.memory_sub_keys**2, width, config.memory_value_lr)
        self.memory_values = ValueTable(*table) if config.shares_values else None
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        thoughts: Tensor | None = None,
        **kwargs,
    ) -> LahrOutput:
        """Run C columns behind those in the cache.

        `attention_mask`: [B, T] over past and present columns, 0 at padding, or without routing an additive one [B, 1, C, T].
        `position_ids`: [B or 1, C]; default counts real columns. `thoughts`: bool [B, C], true at thought slots; with
        `mod_force_thoughts` they are always selected. Raises ValueError for a cache under a "topk" router.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        whole_rows = bool(config.routed) and config.mod_router == "topk"
        if whole_rows and (use_cache or past_key_values is not None):
            raise ValueError("mod_router: topk chooses among whole rows, which a cache, decoding and feedback do not have")
        if use_cache is None:
            use_cache = config.use_cache and not whole_rows and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        n_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns, embeds = self._columns(embeds, attention_mask, position_ids, n_past)
        forced = thoughts if config.mod_force_thoughts else None
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x, values_MD = self.dropout(embeds), None if self.memory_values is None else self.memory_values.weight
        states, routes = [], []
        for layer, block in enumerate(self.layers):
            if wanted:
                states.append(x)
            route = None
            if str(layer) in self.routers:
                # Outside of the block, which may be run a second time for its gradients.
                route = self.routers[str(layer)](x, columns.real_BC, forced, cached=use_cache or n_past > 0)
                routes.append(route)
            x = block(x, columns, cache=past_key_values, route=route, values_MD=values_MD)
        x = self.norm(x)
        return LahrOutput(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, x) if wanted else None,
            columns=_joined(routes),
        )

    def _columns(self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor | None, n_past: int):
        """What the blocks share, and the embeddings with learned positions added."""
        config, C = self.config, embeds.shape[1]
        bias = real_BT = None
        if mask is not None and mask.ndim == 4:
            if config.routed:
                raise ValueError("attention_mask: token skipping needs one of [B, T], which tells padding from tokens")
            bias = mask.to(embeds.dtype).clamp(min=HIDDEN)
        elif mask is not None:
            if mask.shape[1] != n_past + C:
                raise ValueError(f"attention_mask: {mask.shape[1]} columns for {n_past} past and {C} present ones")
            real_BT = mask.bool()
        if position_ids is None and real_BT is not None:
            position_ids = (real_BT.cumsum(1) - 1).clamp(min=0)[:, n_past:]
        elif position_ids is None:
            position_ids = torch.arange(n_past, n_past + C, device=embeds.device)[None]
        rope = None
        if self.embed_positions is not None:
            embeds = embeds + self.embed_positions(position_ids)
        else:
            rope = rope_tables(position_ids, config.head_dim, embeds.dtype)
        gathered = config.mod_compute == "gathered"
        if config.mod_compute == "auto" and not torch.compiler.is_compiling():
            gathered = embeds.device.type == "cpu" or C >= GATHER_FROM
        plain = mask is None and (n_past == 0 or C == 1)
        if bias is None and (not plain or (gathered and config.routed)):
            bias = attention_bias(real_BT, n_past, C, embeds)
        real_BC = None if real_BT is None else real_BT[:, n_past:]
        reads_embeds = config.remembering and config.memory_input == "embeddings"
        return Columns(bias, plain, rope, real_BC, embeds if reads_embeds else None, gathered), embeds


def rope_tables(position_ids: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, [B or 1, C, head_dim / 2], float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    speed = base ** -(torch.arange(0, head_dim, 2, device=position_ids.device, dtype=wide) / head_dim)
    angle = position_ids[..., None].to(wide) * speed
    return angle.cos(), angle.sin()


def _joined(routes: list[Route]) -> dict[str, Tensor] | None:
    if not routes:
        return None
    parts = {"mod_selected": "selected", "mod_scores": "scores", "mod_predicted": "predicted"}
    per_layer = {name: [getattr(route, part) for route in routes] for name, part in parts.items()}
    return {name: torch.stack(tensors, -1) for name, tensors in per_layer.items() if tensors[0] is not None}


class LahrForCausalLM(LahrPreTrainedModel, GenerationMixin):
    """`LahrModel` with a head, tied to the embeddings by default. Routers move in `after_update`, never in a forward."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: LahrConfig):
        super().__init__(config)
        self.model = LahrModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> LahrCausalOutput:
        """Logits [B, C, V] (of the last `logits_to_keep` columns where it is not 0) and, with labels [B, C], the loss.

        Labels are -100 where nothing is asked and are shifted here; in training the loss holds `extra_loss`.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss, extra = None, 0.0
        if self.training:
            real_BC = None if attention_mask is None else attention_mask[:, -out.last_hidden_state.shape[1] :].bool()
            extra = self.extra_loss(out.columns, real_BC)
        if labels is not None:
            asked = logits[:, :-1].flatten(0, 1)
            asked = asked.float() if asked.dtype in (torch.bfloat16, torch.float16) else asked
            losses = F.cross_entropy(asked, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
            loss = losses / (labels[:, 1:] != -100).sum().clamp(min=1) + extra
        return LahrCausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            columns=out.columns,
        )

    # ------------------------------------------------------------ what training asks for

    @property
    def needs_mask(self) -> bool:
        """Whether padding on the right must be told too: it may not be routed, nor counted."""
        return bool(self.config.routed)

    @property
    def single_pass_only(self) -> bool:
        """Whether tokens look at later ones ("topk"), which feedback and decoding can't have."""
        return bool(self.config.routed) and self.config.mod_router == "topk"

    def extra_loss(self, columns: dict[str, Tensor] | None, real_BC: Tensor | None) -> Tensor:
        """The predictors' loss over whole rows of joined columns, weighted; 0 with other routers.

        To be called once for each training forward: it also notes the scores that the thresholds are to follow. That can't be
        done on the way, where blocks may be computed twice, passes repeated or compiled, and padding is not always told.
        """
        columns = columns or {}
        for router, scores_BC in zip(self.model.routers.values(), columns["mod_scores"].unbind(2) if columns else ()):
            router.note(scores_BC, real_BC)
        if "mod_predicted" not in columns:
            return self.lm_head.weight.new_zeros(())
        return self.config.mod_aux_coef * predictor_loss(columns, real_BC, self.config.mod_capacity)

    def statistics(
        self, columns: dict[str, Tensor] | None, asked_BT: Tensor, thought_BT: Tensor, real_BT: Tensor
    ) -> dict[str, float]:
        """Share of tokens that each routed layer selects, and of question, thought and text (asked) tokens over all layers."""
        if columns is None:
            return {}
        kinds_BT = torch.where(thought_BT, KINDS.index("thought"), KINDS.index("question"))
        rates = routing_rates(columns["mod_selected"], kinds_BT.masked_fill(asked_BT, KINDS.index("text")), real_BT)
        layers = zip(self.config.routed, rates.pop("all").tolist())
        of_kinds = {f"mod/{kind}": float(rate_R.mean()) for kind, rate_R in rates.items() if not rate_R.isnan().any()}
        return {f"mod/layer_{layer}": rate for layer, rate in layers} | of_kinds

    def forget_scores(self) -> None:
        """Drop what was noted since the last update, as after forwards that were trials and no training."""
        for router in self.model.routers.values():
            router.forget()

    def after_update(self, gather: Callable[[Tensor], Tensor] = lambda scores_N: scores_N) -> None:
        """Once after every optimizer step: the thresholds follow the scores of the update's training forwards.

        `gather`: scores of this process (1-D, maybe none) -> those of all processes.
        """
        for router in self.model.routers.values():
            router.after_update(gather)


AutoConfig.register("lahr", LahrConfig)
AutoModelForCausalLM.register(LahrConfig, LahrForCausalLM)
