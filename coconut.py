"""Chain of Continuous Thought (Coconut, arXiv 2412.06769): one wrapper around any Hugging Face causal LM.

A causal LM with a key/value cache computes each column once. Feedback cuts the columns where a thought needs the
state before it, so a step with n thoughts is n + 1 passes over disjoint columns, never a second look at the prefix:

    columns   q1 .. qm <bot> | t1 | t2 | .. | tn <eot> a1 .. |
    pass            0          1    2             n              feedback that reads a hidden state (continuous)
    pass                       0                                 feedback that does not (every pause mode)

Thought k is the last hidden state (after the final norm) of the column before slot k, fed as that slot's input
embedding. `Coconut.rollout` is that loop; training, generation and every analysis go through it.

Shape letters: B rows, T columns, C columns of one pass, S slots of one pass, D width, V vocabulary, N labelled positions.
"""

from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import generation
from attention import append_cache, cloned, concatenating_cache, no_cache, visible, visible_to
from passes import Pass, Plan, plan_passes
from taps import checkpoints_activations, decoder_blocks, edited, refuse_scaled_logits, tapped

Outputs = namedtuple("Outputs", ["loss", "inputs_embeds", "logits"])
Rollout = namedtuple("Rollout", ["hidden_BTD", "inputs_embeds_BTD", "cache", "columns"], defaults=[None])
Edit = Callable[[int, "Pass", Tensor], Tensor | None]

MAX_N_LATENT = 8  # importable for older scripts; there is no limit here


# ---------------------------------------------------------------- what fills a thought


class Thought(nn.Module):
    """What fills slot k: `forward(k, h)` -> [D] or [B, D], or None to keep the token's own embedding.

    `reads_hidden` says whether it needs h, the state before the slot ([B, D], after the final norm); `mode_id` is its
    number in checkpoint files. A mode never sees cache, mask, columns or labels.
    """

    mode_id: int | None = None
    reads_hidden = False

    def __init__(self, pause_D: Tensor):
        super().__init__()


class Continuous(Thought):
    """The last hidden state of the column before the slot; gradients flow through all passes (Coconut)."""

    reads_hidden = True

    def forward(self, k: int, h_BD: Tensor) -> Tensor:
        return h_BD


class Frozen(Thought):
    """One constant vector for every slot; it never moves."""

    mode_id = 1

    def __init__(self, pause_D: Tensor):
        super().__init__(pause_D)
        self.register_buffer("feedback_mode_id", torch.tensor(self.mode_id))
        self.register_buffer("pause_embedding", pause_D.clone())

    def forward(self, k: int, h_BD: Tensor | None) -> Tensor:
        return self.pause_embedding


class LearnedShared(Frozen):
    """One learned vector for all slots and rows."""

    mode_id = 2

    def __init__(self, pause_D: Tensor):
        super().__init__(pause_D)
        del self.pause_embedding
        self.pause_embedding = nn.Parameter(pause_D.clone())


class PauseCurriculum(LearnedShared):
    """The same function under its own name: with a causal mask, how many passes one runs is no part of it."""

    mode_id = 3


class OwnToken(Thought):
    """A plain language model: latent tokens, if its text has any, are ordinary ones."""

    def forward(self, k: int, h_BD: Tensor | None) -> None:
        return None


FEEDBACK_MODES = {
    "continuous": Continuous,
    "frozen": Frozen,
    "learned_shared": LearnedShared,
    "pause_curriculum": PauseCurriculum,
    "none": OwnToken,
}
SYNONYMS = {"pause_multipass": "learned_shared"}


def canonical_mode(name: str) -> str:
    """The stored name of a feedback mode. Raises ValueError that lists the known ones."""
    name = SYNONYMS.get(name, name)
    if name not in FEEDBACK_MODES:
        raise ValueError(f"feedback_mode {name!r} is unknown; known: {', '.join([*FEEDBACK_MODES, *SYNONYMS])}")
    return name


# ---------------------------------------------------------------- the wrapper


class Coconut(nn.Module):
    """A causal LM whose latent tokens are filled by `feedback_mode`.

    Args:
        base_causallm: a Hugging Face causal LM (embedding already resized to hold the latent tokens).
        latent_token_id: the token that marks a thought slot; None for a plain language model without any.
        start_latent_id, end_latent_id: the markers around the thoughts (kept for callers; the rollout does not read them).
        eos_token_id: ends a generated row.
        feedback_mode: a key of `FEEDBACK_MODES` or a synonym.
        force_multipass: run a pause mode as a loop over the slots; same values, for timing studies.
        latent_iterations: refine all thoughts in parallel this many times (Jacobi iteration, PCCoT arXiv 2506.18582) instead
            of one after the other. Exact from the number of thoughts on, approximate below it. Only where thoughts
            read hidden states.
        latent_norm: "match_embedding" scales every fed-back state to the RMS of the embedding table (at the start of training
            a state after the final norm is some 50 times longer than a token of GPT-2); "none" feeds it as it is (Coconut).

    Every method takes `edit(layer, pass_, x)`: layer 0 is the embeddings a pass is given, after feedback; layer i the
    output of block i, before any final norm; return a replacement of `x` ([B, C, D]) or None to keep it. `edit.layers`,
    an iterable of layers, says which ones it wants to see (default: only 0). `after_pass(pass_, is_last)`, where one is
    set, is called when a pass is done (for timing).
    """

    def __init__(
        self,
        base_causallm,
        latent_token_id: int | None,
        start_latent_id: int | None,
        end_latent_id: int | None,
        eos_token_id: int,
        feedback_mode: str = "continuous",
        force_multipass: bool = False,
        latent_iterations: int | None = None,
        latent_norm: str = "none",
    ):
        super().__init__()
        self.base_causallm = base_causallm
        self.embedding = base_causallm.get_input_embeddings()
        self.latent_token_id = latent_token_id
        self.start_latent_id, self.end_latent_id, self.eos_token_id = start_latent_id, end_latent_id, eos_token_id
        self.feedback_mode = canonical_mode(feedback_mode)
        if latent_token_id is None and self.feedback_mode != "none":
            raise ValueError(f"feedback_mode {feedback_mode!r} needs a latent_token_id")
        token = torch.tensor([latent_token_id or 0], device=self.embedding.weight.device)
        pause_D = self.embedding(token)[0].detach()  # as fed: some embeddings scale their rows
        self.feedback = FEEDBACK_MODES[self.feedback_mode](pause_D)
        if latent_iterations is not None and (latent_iterations < 1 or not self.feedback.reads_hidden):
            raise ValueError("latent_iterations must be at least 1, and needs feedback_mode continuous")
        self.force_multipass, self.latent_iterations, self.latent_norm = force_multipass, latent_iterations, latent_norm
        self.compiled = False  # see compiled.py
        self.after_pass: Callable[[Pass, bool], None] | None = None
        self.gen_forward_cnt = 0
        refuse_scaled_logits(base_causallm.config)
        if getattr(base_causallm, "single_pass_only", False) and self.feedback.reads_hidden:
            raise ValueError("this backbone looks at whole sequences (mod_router: topk) and can't think step by step")
        # Files hold `pause_embedding` and `feedback_mode_id` at the top level, not under the submodule's name.
        self.register_state_dict_post_hook(_lift_feedback_keys)
        self.register_load_state_dict_pre_hook(_sink_feedback_keys)

    @property
    def pause_embedding(self) -> Tensor | None:
        """The vector of the pause modes, [D]; None for the others."""
        return getattr(self.feedback, "pause_embedding", None)

    # ------------------------------------------------------------ the one loop

    def plan(self, input_ids, attention_mask=None, position_ids=None, labels=None, row_ids=None) -> Plan:
        """What a batch ([B, T] tensors, best on the CPU: elsewhere this waits for the device) asks of the rollout."""
        ids_BT, mask_BT, positions_BT, labels_BT = (
            None if x is None else x.cpu() for x in (input_ids, attention_mask, position_ids, labels)
        )
        row_ids = tuple(range(len(ids_BT)) if row_ids is None else row_ids)
        latent_BT = ids_BT == (-1 if self.latent_token_id is None else self.latent_token_id)
        cut = self.feedback.reads_hidden or self.force_multipass
        if mask_BT is None:
            mask_BT = torch.ones_like(ids_BT)
        passes = plan_passes(latent_BT, cut, row_ids, self.latent_iterations, begins=mask_BT.long().argmax(1))
        left_padded = bool((mask_BT[:, :-1] < mask_BT[:, 1:]).any())
        usual_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        usual = positions_BT is None or bool(((positions_BT == usual_BT) | (mask_BT == 0)).all())
        labelled = None if labels_BT is None else (labels_BT[:, 1:] != -100).nonzero(as_tuple=True)
        return Plan(passes, left_padded, usual, labelled)

    def rollout(
        self, input_ids, attention_mask=None, position_ids=None, *, plan=None, cache=None, edit=None, row_ids=None
    ) -> Rollout:
        """Run the passes over a batch of tokens (int64 [B, T]) and fill every thought slot on the way.

        `attention_mask` ([B, T], 0 at padding; default all ones) and `position_ids` ([B, T]; default counts real columns)
        may pad on both sides. `plan` is what `self.plan` made of the same batch on the CPU (default: made here). `cache` is
        an empty cache to keep; without one it is dropped. Returns the hidden states after the final norm, the embeddings
        that were fed, the cache, and what else the backbone says of each column (`columns`: name -> [B, T, ...], or None). At
        right padding, states are arbitrary.
        """
        plan = plan or self.plan(input_ids, attention_mask, position_ids, row_ids=row_ids)
        n_columns = input_ids.shape[1]
        # Compiled passes can't append in place under autograd, but can concatenate; with one kind of mask they are fewer.
        compiled = self.compiled and self.training
        if len(plan.passes) > 1 and cache is None:
            config = self.base_causallm.config
            cache = concatenating_cache(config) if compiled else append_cache(config, n_columns)
        told = plan.left_padded or compiled or getattr(self.base_causallm, "needs_mask", False)
        seen = visible(self.base_causallm, attention_mask if told else None)
        positions_BT = self._positions(plan, input_ids, attention_mask, position_ids, compiled)

        cuts = sorted({edge for pass_ in plan.passes for edge in (pass_.start, pass_.stop)})
        pieces = dict(zip(cuts, self.embedding(input_ids).split([b - a for a, b in zip(cuts, cuts[1:])], 1)))
        read = {slot.column - 1 for pass_ in plan.passes for slot in pass_.slots}
        length = self.embedding_rms() if read and self.latent_norm == "match_embedding" else None
        fed, states, said, state_of, end = [], [], [], {}, 0
        for pass_ in plan.passes:
            if pass_.start < end:
                cache.crop(pass_.start - end)
            x_BCD = _join([piece for start, piece in pieces.items() if pass_.start <= start < pass_.stop])
            x_BCD = self._fill(x_BCD, pass_, state_of)
            mask, positions_BC = visible_to(seen, pass_.start, pass_.stop), positions_BT[:, pass_.start : pass_.stop]
            x_BCD, h_BCD, columns = self._backbone_pass(x_BCD, pass_, mask, positions_BC, cache, edit)
            here = [column for column in read if pass_.start <= column < pass_.stop]
            state_of |= {column: _of_length(h_BCD[:, column - pass_.start], length) for column in here}
            end = pass_.stop
            if not pass_.again:
                fed.append(x_BCD)
                states.append(h_BCD)
                said.append(columns)
            if self.after_pass is not None:
                self.after_pass(pass_, pass_ is plan.passes[-1])
        columns = {name: _join([part[name] for part in said]) for name in said[0]} if said[0] else None
        return Rollout(_join(states), _join(fed), cache, columns)

    @torch.no_grad()
    def embedding_rms(self) -> Tensor:
        """Root mean square of all entries of the embedding table, as fed; a scalar."""
        weight_VD = self.embedding.weight
        return self.embedding(torch.arange(len(weight_VD), device=weight_VD.device)).square().mean().sqrt()

    def _positions(self, plan: Plan, input_ids, attention_mask, position_ids, compiled: bool) -> Tensor:
        """Positions [B or 1, T]; those at padding are arbitrary, and within the model's limit."""
        if not plan.usual_positions:
            return position_ids
        if attention_mask is not None and (plan.left_padded or position_ids is None or compiled):
            return (attention_mask.cumsum(1) - 1).clamp(min=0)
        n_columns = input_ids.shape[1]
        limit = getattr(self.base_causallm.config, "max_position_embeddings", None) or n_columns
        return torch.arange(n_columns, device=input_ids.device).clamp(max=limit - 1)[None]

    def _fill(self, x_BCD: Tensor, pass_: Pass, state_of: dict[int, Tensor]) -> Tensor:
        """The embeddings of one pass with its slots (a run of columns) filled: one out-of-place write.

        `state_of`: the newest state [B, D] of the columns that slots read. A slot whose state is not there yet (parallel
        thoughts, first iteration) keeps its token's embedding.
        """
        thoughts = [self.feedback(slot.k, state_of.get(slot.column - 1)) for slot in pass_.slots]
        if not thoughts:
            # A learned vector stays in the graph of slot-less batches, so that all ranks and stages update it alike.
            pause_D = self.pause_embedding
            in_graph = self.training and pause_D is not None and pause_D.requires_grad
            return x_BCD + 0.0 * pause_D if in_graph else x_BCD
        lo, n_slots = pass_.slots[0].column - pass_.start, len(thoughts)
        before, own_BSD, after = x_BCD.split([lo, n_slots, x_BCD.shape[1] - lo - n_slots], 1)
        thoughts = [own_BSD[:, i] if t is None else t.expand_as(own_BSD[:, i]) for i, t in enumerate(thoughts)]
        thought_BSD = torch.stack(thoughts, 1).to(own_BSD.dtype)
        has_BS = torch.stack([slot.rows for slot in pass_.slots], 1)
        if not has_BS.all():
            thought_BSD = torch.where(has_BS.to(x_BCD.device, non_blocking=True)[..., None], thought_BSD, own_BSD)
        return _join([part for part in (before, thought_BSD, after) if part.shape[1]])

    def _backbone_pass(self, x_BCD, pass_: Pass, mask, positions_BC, cache, edit) -> tuple[Tensor, Tensor, dict | None]:
        """The one call of the backbone; `mask` is over past and present columns ([B, P + C], or an additive one
        [B, 1, C, P + C]; None: all real).

        Returns what the pass was given (after the edit), its states after the final norm, and the backbone's `columns`.
        """
        base = self.base_causallm
        self.gen_forward_cnt += 1
        if cache is not None and self.training and checkpoints_activations(base):
            raise ValueError("gradient checkpointing switches the cache off, which makes multi-pass results wrong; disable it")
        with ExitStack() as hooks:
            if self.compiled and (edit is not None or not self.training):
                hooks.enter_context(torch.compiler.set_stance("force_eager"))
            elif self.compiled:  # code is made anew for other strides
                mask, positions_BC = cloned(mask), cloned(positions_BC)
            if edit is not None:
                x_BCD = edited(edit, 0, pass_, x_BCD)
                for layer in getattr(edit, "layers", ()):
                    if layer > 0:
                        hooks.enter_context(tapped(decoder_blocks(base)[layer - 1], edit, layer, pass_))
            out = base.base_model(
                inputs_embeds=x_BCD,
                attention_mask=mask,
                position_ids=positions_BC,
                past_key_values=no_cache(base.config) if cache is None and mask is None else cache,
                use_cache=cache is not None,
                **self._told(pass_, x_BCD),
            )
        return x_BCD, out.last_hidden_state, getattr(out, "columns", None)

    def _told(self, pass_: Pass, x_BCD: Tensor) -> dict:
        """Which columns are thoughts ([B, C] bool), for a backbone that treats them otherwise."""
        if not getattr(self.base_causallm.config, "mod_force_thoughts", False):
            return {}
        thoughts_BC = torch.zeros(x_BCD.shape[:2], dtype=torch.bool)
        for slot in pass_.slots:
            thoughts_BC[:, slot.column - pass_.start] = slot.rows
        return {"thoughts": thoughts_BC.to(x_BCD.device)}

    # ------------------------------------------------------------ training

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]."""
        lm_head = self.base_causallm.get_output_embeddings()
        return F.linear(hidden, self.embedding.weight) if lm_head is None else lm_head(hidden)

    def label_losses(self, hidden_BTD: Tensor, labels_BT: Tensor, labelled=None, columns=None) -> tuple[Tensor, Tensor]:
        """Cross-entropy (float32 or wider, [N]) at the N labelled positions and the row of each; only they meet the head.

        `labelled`: their rows and columns where a plan knows them (finding them waits for the device). A backbone with a
        loss of its own (`token_losses`) gets its `columns` there, in training.
        """
        rows_N, columns_N = (labels_BT[:, 1:] != -100).nonzero(as_tuple=True) if labelled is None else labelled
        if self.training and columns is not None and hasattr(self.base_causallm, "token_losses"):
            own = {name: values[rows_N, columns_N] for name, values in columns.items()}
            targets_N = labels_BT[rows_N, columns_N + 1]
            return self.base_causallm.token_losses(hidden_BTD[rows_N, columns_N], own, targets_N), rows_N
        logits_NV = self.head(hidden_BTD[rows_N, columns_N])
        logits_NV = logits_NV.float() if logits_NV.dtype in (torch.bfloat16, torch.float16) else logits_NV
        return F.cross_entropy(logits_NV, labels_BT[rows_N, columns_N + 1], reduction="none"), rows_N

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        position_ids=None,
        *,
        plan=None,
        full_logits=None,
        edit=None,
        row_ids=None,
    ) -> Outputs:
        """Teacher-forced forward.

        Args:
            input_ids, attention_mask, labels, position_ids: [B, T]; labels are -100 where nothing is asked, and are shifted here.
            plan: what `self.plan` made of the same batch on the CPU; with it nothing here waits for the device.
            full_logits: return logits of all positions ([B, T, V]). Default: not while training with labels.

        Returns:
            Outputs(loss: mean cross-entropy over labelled positions or None, inputs_embeds [B, T, D] as fed, logits or None).
        """
        plan = plan or self.plan(input_ids, attention_mask, position_ids, labels, row_ids)
        hidden_BTD, embeds_BTD, _, columns = self.rollout(input_ids, attention_mask, position_ids, plan=plan, edit=edit)
        loss = logits = None
        if labels is not None:
            labelled = tuple(index.to(hidden_BTD.device, non_blocking=True) for index in plan.labelled)
            loss_N, _ = self.label_losses(hidden_BTD, labels, labelled, columns)
            loss = loss_N.sum() / max(len(loss_N), 1)
            if self.training and columns is not None and hasattr(self.base_causallm, "extra_loss"):
                real_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                loss = loss + self.base_causallm.extra_loss(columns, real_BT.bool())
        if full_logits or (full_logits is None and not (self.training and labels is not None)):
            logits = self.head(hidden_BTD)
        return Outputs(loss, embeds_BTD, logits)

    # ------------------------------------------------------------ after the thoughts

    def extend(self, input_ids, cache, start: int, mask_BT=None, position_ids=None, *, edit=None, row_ids=None) -> Rollout:
        """Run further columns of plain tokens (int64 [B, C]) behind the `start` columns that a rollout left in `cache`.

        `mask_BT` ([B, start + C]; default all real) and `position_ids` ([B, C]; default counts columns). Returns the states
        after the final norm [B, C, D], the embeddings as fed, and the cache, which holds these columns too now.
        """
        stop = start + input_ids.shape[1]
        pass_ = Pass(self.gen_forward_cnt, start, stop, (), tuple(range(len(input_ids)) if row_ids is None else row_ids))
        if position_ids is None:
            position_ids = torch.arange(start, stop, device=input_ids.device)[None]
        mask = visible(self.base_causallm, mask_BT, start)
        x_BCD, h_BCD, columns = self._backbone_pass(self.embedding(input_ids), pass_, mask, position_ids, cache, edit)
        return Rollout(h_BCD, x_BCD, cache, columns)

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=16,
        output_embedding=False,
        synced_gpus=False,
        *,
        position_ids=None,
        edit=None,
        row_ids=None,
    ):
        """Greedy, batched decoding on the rollout's cache.

        A row ends at its first EOS (also as first new token), or where the model has no more positions. Returns
        [B, T + new] ids: the prompt, the new tokens without EOS, and EOS as filler up to the longest row; with
        `output_embedding` also their embeddings as fed, [B, T + new, D]. `gen_forward_cnt` counts the backbone calls.
        `synced_gpus` is accepted and has no effect: nothing here needs ranks in step.
        """
        self.gen_forward_cnt = 0
        ids_BT, embeds_BTD = generation.generate(self, input_ids, attention_mask, max_new_tokens, position_ids, edit, row_ids)
        return (ids_BT, embeds_BTD) if output_embedding else ids_BT


# ---------------------------------------------------------------- helpers


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _of_length(h_BD: Tensor, rms: Tensor | None) -> Tensor:
    """States scaled to a root mean square; as they are where there is none."""
    return h_BD if rms is None else h_BD * (rms / h_BD.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8))


def COCONUTModel(config, feedback_mode: str = "continuous", start=2, latent=3, end=4, eos=1) -> Coconut:
    """A new causal LM of a Hugging Face config in its wrapper; token ids default to those of the character tokenizer.

    model = COCONUTModel(LahrConfig.size("tiny", vocab_size=100))
    model(input_ids, labels=labels).loss
    """
    return Coconut(AutoModelForCausalLM.from_config(config), latent, start, end, eos, feedback_mode)


def _lift_feedback_keys(module, state_dict, prefix, local_metadata) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}feedback.")]:
        state_dict[prefix + key.removeprefix(f"{prefix}feedback.")] = state_dict.pop(key)


def _sink_feedback_keys(module, state_dict, prefix, *_) -> None:
    for name in module.feedback.state_dict():
        if prefix + name in state_dict:
            state_dict[f"{prefix}feedback.{name}"] = state_dict.pop(prefix + name)
