"""Cognate: a small causal LM of a windowed trunk, a long-term memory behind a gate, and a recursive refiner that halts.

    model = CognateForCausalLM(CognateConfig(specialization="reasoning"))      # 25,623,681 parameters
    out = model(ids, labels=ids)                  # labels are shifted inside; out.loss, out["logits"], out.halting_steps
    model.generate(ids, max_new_tokens=20)        # as any Hugging Face causal LM
    AutoModelForCausalLM.from_pretrained(folder)  # once this module is imported

The config is in cognate_config.py, everything below the head in cognate_model.py; here are the head and the losses.

Shape letters: B rows, T new tokens, D width, V vocabulary, N labelled positions, R refinement steps, S = R + 1 with step 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin
from transformers.utils import ModelOutput

from backbones.cognate_config import SPECIALIZATIONS, CognateConfig
from backbones.cognate_model import CognateModel, CognatePreTrainedModel
from backbones.halting import divergence_from_prior, halting_log_probs, step_cross_entropy
from backbones.window import real_columns, wide


@dataclass
class CognateOutput(ModelOutput):
    """Of B rows and T new tokens; losses are scalars (float32 or wider) and None without labels.

    `loss` is what training minimises, `loss_ce + loss_act + loss_gate`; in evaluation the plain cross-entropy of
    `logits`, and so is `loss_ce`. `step_losses` [R + 1]: cross-entropy of the answers at steps 0 .. R. `halt_probs`
    [B, T, R + 1]: column 0 is read before the first step and halts nothing. `halting_steps` [B]: mean over real tokens of
    `token_halting_steps` [B, T]. `hidden_states[-1]` enters the head. With `return_all_steps`: `all_y` [B, T, D] a step (as
    they would enter the head), `all_z`, and `all_logits` [B, T, V] a step.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    halt_probs: Tensor | None = None
    halting_steps: Tensor | None = None
    token_halting_steps: Tensor | None = None
    gate_entropy: Tensor | None = None
    loss_ce: Tensor | None = None
    loss_act: Tensor | None = None
    loss_gate: Tensor | None = None
    step_losses: Tensor | None = None
    all_logits: tuple[Tensor, ...] | None = None
    all_y: tuple[Tensor, ...] | None = None
    all_z: tuple[Tensor, ...] | None = None


class CognateForCausalLM(CognatePreTrainedModel, GenerationMixin):
    """The model with its head, tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CognateConfig):
        super().__init__(config)
        self.model = CognateModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._seen: Tensor | None = None  # right answers a step and their number [S + 1], since the last update
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.lm_head = head

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
        mask: Tensor | None = None,
        return_all_steps: bool = False,
        return_logits: bool = True,
        return_dict: bool = True,
        **kwargs,
    ) -> CognateOutput:
        """See `CognateModel.forward` and `CognateOutput`. `mask` is another name of `attention_mask`.

        `labels` [B, T] are shifted here; -100 and padding (by the mask, not by token) are left out, as is the first token
        behind padding, which nothing predicts. `return_logits=False` spares training the [B, T, V] logits that no loss needs.
        """
        if mask is not None and attention_mask is not None:
            raise ValueError("mask is another name of attention_mask; pass one of them")
        attention_mask = mask if attention_mask is None else attention_mask
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_all_steps=return_all_steps or labels is not None,
        )
        hidden_BTD, columns = out.last_hidden_state, out.columns
        steps_BT = columns["halting_steps"]
        real_BT = torch.ones_like(steps_BT, dtype=torch.bool)
        if attention_mask is not None:
            real_BT = real_BT & real_columns(attention_mask)[:, -steps_BT.shape[1] :]
        losses = {} if labels is None else self._losses(columns, labels, real_BT)
        result = CognateOutput(
            logits=self.lm_head(hidden_BTD) if return_logits else None,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            halt_probs=wide(columns["halt_logits"]).sigmoid(),
            halting_steps=(steps_BT * real_BT).sum(1) / real_BT.sum(1).clamp(min=1),
            token_halting_steps=steps_BT,
            gate_entropy=columns["gate_entropy"],
            **losses,
        )
        if return_all_steps:
            result.all_y, result.all_z = columns["states"].unbind(2), columns["latents"].unbind(2)
            result.all_logits = tuple(self.lm_head(y) for y in result.all_y)
        return result if return_dict else result.to_tuple()

    # ------------------------------------------------------------ losses

    def _losses(self, columns: dict[str, Tensor], labels_BT: Tensor, real_BT: Tensor) -> dict:
        rows_N, columns_N = ((labels_BT[:, 1:] != -100) & real_BT[:, 1:] & real_BT[:, :-1]).nonzero(as_tuple=True)
        targets_N, n = labels_BT[rows_N, columns_N + 1], max(len(rows_N), 1)
        at_labels = {key: x[rows_N, columns_N] for key, x in columns.items()}
        loss_NS, correct_NS = step_cross_entropy(at_labels["states"], self.lm_head.weight, targets_N)
        ce_N, act_N = self._mixed(loss_NS, correct_NS, at_labels["halt_logits"])
        halting, gate = self._regularisers(columns, real_BT)
        some = min(len(rows_N), 1)  # a batch that asks nothing has loss 0
        loss_act, loss_gate = act_N.sum() / n + some * halting, some * gate
        if self.training:
            self._note(correct_NS)
            loss_ce = ce_N.sum() / n
            loss = loss_ce + loss_act + loss_gate
        else:
            loss = loss_ce = loss_NS[:, -1].sum() / n  # halted tokens keep their answer, so the last is what meets the head
        return {
            "loss": loss,
            "loss_ce": loss_ce,
            "loss_act": loss_act,
            "loss_gate": loss_gate,
            "step_losses": loss_NS.sum(0) / n,
        }

    def token_losses(self, hidden_ND: Tensor, columns_N: dict[str, Tensor], targets_N: Tensor) -> Tensor:
        """What training minimises at N labelled positions, [N]: expected cross-entropy over steps, or the `bce` sum.

        `columns_N`: the model's columns there, with their `states` of all steps.
        """
        loss_NS, correct_NS = step_cross_entropy(columns_N["states"], self.lm_head.weight, targets_N)
        self._note(correct_NS)
        ce_N, act_N = self._mixed(loss_NS, correct_NS, columns_N["halt_logits"])
        return ce_N + act_N

    def extra_loss(self, columns_BC: dict[str, Tensor], real_BC: Tensor) -> Tensor:
        """What training adds over all tokens: the halting head's regularisers and the gate's entropy; a scalar."""
        return sum(self._regularisers(columns_BC, real_BC))

    def _mixed(self, loss_NS: Tensor, correct_NS: Tensor, logits_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy mixed over steps, and the halting head's own loss, [N] each."""
        config, R = self.config, self.config.max_recursions
        logits_NR = wide(logits_NS)[:, 1:]
        if R and config.use_act and config.act_loss == "ponder":
            return (halting_log_probs(logits_NR).exp() * loss_NS[:, 1:]).sum(1), loss_NS.new_zeros(len(loss_NS))
        weight_S = loss_NS.new_tensor(config.step_weights[-R - 1 :])
        ce_N = loss_NS @ weight_S / weight_S.sum()
        if not (R and config.use_act):
            return ce_N, torch.zeros_like(ce_N)
        target_NR = self.model.act_head.gain_targets(loss_NS, correct_NS)
        act_NR = F.binary_cross_entropy_with_logits(logits_NR, target_NR, reduction="none")
        return ce_N, config.act_loss_weight * act_NR.mean(1)

    def _regularisers(self, columns_BC: dict[str, Tensor], real_BC: Tensor) -> tuple[Tensor, Tensor]:
        config, head = self.config, self.model.act_head
        n = real_BC.sum().clamp(min=1)
        gate = -config.gate_entropy_weight * (columns_BC["gate_entropy"] * real_BC).sum() / n
        halting = 0.0 * wide(columns_BC["halt_logits"]).sum()  # keeps the head in the graph of every rank, used or not
        if not config.max_recursions:  # nor may ranks wait for gradients of a refiner that never runs
            unused = (self.model.recursion.refiner, self.model.recursion.updater)
            halting = halting + 0.0 * sum(p.sum() for module in unused for p in module.parameters())
        logits_BCR = wide(columns_BC["halt_logits"])[..., 1:]
        if config.use_act and config.max_recursions and config.act_loss == "ponder":
            halting = (divergence_from_prior(logits_BCR, config.ponder_prior) * real_BC).sum() / n
        elif config.use_act and config.max_recursions:
            halting = torch.stack([head.spread(logits_BC, real_BC) for logits_BC in logits_BCR.unbind(-1)]).mean()
        return config.act_loss_weight * halting, gate

    def compute_act_loss(self, q: Tensor, step: int, is_correct: Tensor | None = None) -> Tensor:
        """See `HaltingHead.compute_act_loss`."""
        return self.model.act_head.compute_act_loss(q, step, is_correct)

    def _note(self, correct_NS: Tensor) -> None:
        if self.config.act_target == "ema":
            n = correct_NS.new_full((1,), len(correct_NS), dtype=torch.long)
            counts = torch.cat([correct_NS.sum(0), n])
            self._seen = counts if self._seen is None else self._seen + counts

    def after_update(self, gather=lambda x: x) -> None:
        """To be called once behind every optimizer step; `gather`: a 1-D tensor of this rank -> those of all ranks.

        Moves the accuracies of `act_target: ema`; nothing else here has a state.
        """
        if self.config.act_target == "ema":
            n_entries, buffer = self.config.max_recursions + 2, self.model.act_head.step_accuracy
            mine = buffer.new_zeros(n_entries, dtype=torch.long) if self._seen is None else self._seen
            everyone, self._seen = gather(mine).view(-1, n_entries).sum(0), None
            if everyone[-1] > 0:
                self.model.act_head.update(everyone[:-1], everyone[-1])

    def statistics(self, columns: dict[str, Tensor], asked_BT: Tensor, thought_BT: Tensor, real_BT: Tensor) -> dict[str, float]:
        """Halting steps of real tokens, the variance of the first step's q within rows, and the gate's share for the memory."""
        steps_N, found = columns["halting_steps"][real_BT].float(), {}
        for name in ("avg", "max", "min"):
            value = steps_N.mean() if name == "avg" else getattr(steps_N, name)()
            found[f"act/{name}_halting_steps"] = float(value)
        found["act/halting_variance"] = float(steps_N.var(unbiased=False))
        if self.config.max_recursions and self.config.use_act:
            q_BT = wide(columns["halt_logits"])[..., 1].sigmoid()
            mean_B1 = (q_BT * real_BT).sum(1, keepdim=True) / real_BT.sum(1, keepdim=True).clamp(min=1)
            found["act/q_variance"] = float((q_BT - mean_B1)[real_BT].square().mean())
        found["ltm/memory_usage"] = float(columns["memory_share"][real_BT].mean())
        return found | {"gate/entropy": float(columns["gate_entropy"][real_BT].mean())}

    # ------------------------------------------------------------ helpers

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters: backbone (blocks, norm, memory, gate), trm, act_head, lm_head (0 if tied), embeddings, total."""

        def count(*modules: nn.Module) -> int:
            return sum(p.numel() for module in modules for p in module.parameters())

        m, tied = self.model, self.lm_head.weight is self.model.embed_tokens.weight
        return {
            "embeddings": count(m.embed_tokens, m.embed_positions),
            "backbone": count(m.layers, m.norm, m.memory, m.gate),
            "trm": count(m.recursion),
            "act_head": count(m.act_head),
            "lm_head": 0 if tied else count(self.lm_head),
            "total": count(self),
        }

    def get_config_dict(self) -> dict:
        """The config as plain types."""
        return self.config.to_dict()

    def reset_memory(self) -> None:
        """Has no effect: no memory outlives a call. Kept for callers of the original."""


def create_phase1_models(device: str | torch.device = "cpu", **changes) -> dict[str, CognateForCausalLM]:
    """One model of each specialization on `device`, made under its own seed; `changes` go to every config."""
    models = {}
    for name, special in SPECIALIZATIONS.items():
        with torch.random.fork_rng():
            torch.manual_seed(special.seed)
            models[name] = CognateForCausalLM(CognateConfig(specialization=name, **changes)).to(device)
    return models


TRMTitansMAGModel, Phase1Config = CognateForCausalLM, CognateConfig
AutoConfig.register("cognate", CognateConfig)
AutoModel.register(CognateConfig, CognateModel)
AutoModelForCausalLM.register(CognateConfig, CognateForCausalLM)
