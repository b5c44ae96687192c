"""The probabilities of choices, computed plainly."""

from __future__ import annotations

import torch

from ws.lm.models import encode


def reference(model, tok, prompt, choices):
    """One prompt at a time, all positions, plain sums over the vocabulary."""
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    texts = [tok.decode([i]) for i in range(len(tok))]
    special = set(tok.all_special_ids)
    return [
        sum(float(p[i]) for i, t in enumerate(texts) if i not in special and t.lstrip(" \n\t").lower() == c.lower())
        for c in choices
    ]
