"""torch.compile for the passes of training, tried out before it is trusted.

    why_not = compile_passes(model, precision)      # None: compiled; else one line that says why it stays eager

On CUDA the compiled passes are replayed as CUDA graphs, which removes the launch latency of the one-token passes. Sizes are
symbolic, so a pass of another length is a replay of another graph, not another compilation; prefixes rounded to 64 columns
keep these few. Evaluation and passes whose blocks are tapped by an edit run eagerly.
"""

import contextlib
import math

import torch
from torch import nn

PREFIX_MULTIPLE = 64  # columns to which prefix and width of a batch are rounded up while compiled
KINDS = 32  # of passes: a prefix, a thought, a last one, each again for a single row, for another type of input ...
N_ROWS, N_QUESTION, N_THOUGHTS, N_ANSWER = 5, 11, 3, 7  # the trial batch; equal sizes would be taken for the same one


def compile_passes(model, precision=None, backend: str = "inductor") -> str | None:
    """Compile the backbone of a `Coconut` in place for training. Returns None, or why it could not be: it is eager then.

    The trial runs one small batch, padded and with thoughts, both ways; loss and gradients must agree to 1 % (bf16: 5 %).
    `precision`: a function that makes the autocast context of training.
    """
    precision = precision or contextlib.nullcontext
    base = model.base_causallm.base_model
    was_training = model.training
    batch = _trial_batch(model)
    with torch.random.fork_rng(devices=[] if model.embedding.weight.device.type != "cuda" else None):
        dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        rates = [m.p for m in dropouts]
        try:
            for module in dropouts:
                module.p = 0.0
            model.train()
            eager = _loss_and_norm(model, batch, precision)
            cuda = model.embedding.weight.device.type == "cuda"
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
            base.compile(backend=backend, dynamic=True, **({"options": {"triton.cudagraphs": True}} if cuda else {}))
            model.compiled = True
            fast = _loss_and_norm(model, batch, precision)
            _loss_and_norm(model, batch, precision)  # replayed
        except Exception as error:  # a compiler fails in more ways than can be listed, and training must go on
            uncompile(model)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        finally:
            for module, rate in zip(dropouts, rates):
                module.p = rate
            model.train(was_training)
            model.zero_grad(set_to_none=True)
            forget_trials(model)
    tolerance = 0.05 if torch.bfloat16 in (model.embedding.weight.dtype, _autocast_dtype(model, precision)) else 0.01
    if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(eager, fast)):
        uncompile(model)
        return f"loss and gradient norm {fast} differ from {eager} of the eager passes"
    return None


def forget_trials(model) -> None:
    """Let a backbone forget what it noted of batches that are not trained on."""
    if hasattr(model.base_causallm, "forget_scores"):
        model.base_causallm.forget_scores()


def uncompile(model) -> None:
    """Back to eager passes."""
    model.base_causallm.base_model._compiled_call_impl = None
    model.compiled = False
    torch.compiler.reset()


def _autocast_dtype(model, precision):
    device = model.embedding.weight.device.type
    with precision():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _trial_batch(model) -> dict[str, torch.Tensor]:
    """Rows of arbitrary tokens, the first with padding on the left, both with thoughts where the model has any."""
    vocabulary, latent = model.embedding.weight.shape[0], model.latent_token_id
    n = 0 if latent is None else N_THOUGHTS
    width = N_QUESTION + n + N_ANSWER
    ids = torch.arange(N_ROWS * width).reshape(N_ROWS, width) % vocabulary
    if latent is not None:
        ids[ids == latent] = (latent + 1) % vocabulary
        ids[:, N_QUESTION : N_QUESTION + n] = latent
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    labels = torch.where(torch.arange(width) >= width - N_ANSWER, ids, -100)
    device = model.embedding.weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _loss_and_norm(model, batch, precision) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    torch.compiler.cudagraph_mark_step_begin()
    with precision():
        loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return loss.item(), norm.item()
