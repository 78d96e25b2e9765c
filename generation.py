"""Greedy decoding behind a rollout: batched, cached, each row ends at its own EOS.

    ids = model.generate(**batch, max_new_tokens=64)      # Coconut's method of that name calls `generate` here
"""

import torch
import torch.nn.functional as F

from attention import append_cache


def generate(model, input_ids, attention_mask, max_new_tokens: int, position_ids, edit, row_ids):
    """See `Coconut.generate`. Returns (ids [B, T + new], embeddings [B, T + new, D])."""
    B, T = input_ids.shape
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    length_B = mask_BT.sum(1)
    limit = getattr(model.base_causallm.config, "max_position_embeddings", None) or T + max_new_tokens
    if int(length_B.max()) > limit:
        raise ValueError(f"a prompt of {int(length_B.max())} tokens exceeds the model's {limit} positions")
    cache = append_cache(model.base_causallm.config, T + max_new_tokens)
    hidden_BTD, embeds_BTD, _ = model.rollout(input_ids, mask_BT, position_ids, cache=cache, edit=edit, row_ids=row_ids)
    last_B = T - 1 - mask_BT.flip(1).long().argmax(1)
    h_BD = hidden_BTD[torch.arange(B, device=last_B.device), last_B]
    padded = not bool(mask_BT.all())
    done_B = torch.zeros_like(length_B, dtype=torch.bool)
    ids, fed = [input_ids], [embeds_BTD]
    for column in range(T, T + max_new_tokens):
        token_B = torch.where(done_B, model.eos_token_id, model.head(h_BD).argmax(-1))
        done_B = done_B | (token_B == model.eos_token_id)
        if done_B.all():
            break
        ids.append(token_B[:, None])
        # A new token takes position `length`, the mask grows by one real column, and the cache by what it held.
        done_B = done_B | (length_B >= limit)
        if column == T + max_new_tokens - 1 or done_B.all():
            break
        mask_BT = F.pad(mask_BT, (0, 1), value=1)
        positions_B1 = length_B.clamp(max=limit - 1)[:, None]
        seen_BT = mask_BT if padded else None
        h_B1D, x_B1D, _ = model.extend(token_B[:, None], cache, column, seen_BT, positions_B1, edit=edit, row_ids=row_ids)
        h_BD, length_B = h_B1D[:, -1], length_B + 1
        fed.append(x_B1D)
    ids_BT = torch.cat(ids, 1)
    embeds_BTD = torch.cat(fed, 1)  # without the last token, which was chosen and not fed
    return ids_BT, torch.cat([embeds_BTD, model.embedding(ids_BT[:, embeds_BTD.shape[1] :])], 1)
