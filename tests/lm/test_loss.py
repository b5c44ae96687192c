"""The loss of training is that of all logits at once, whatever a model does to them; the penalty, by a second model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from conftest import SHAPE, build_sharing
from ws.lm import loss as parts
from ws.lm.loss import Head, head_of, predicting, response_loss

HEADED = {
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=0.5),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0),
    "untied": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "tied": Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=SHAPE["vocab_size"]),
    "opt": OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        vocab_size=SHAPE["vocab_size"],
    ),
    "sharing": build_sharing().config,
    "mixture": Qwen3MoeConfig(**SHAPE, num_experts_per_tok=2, moe_intermediate_size=16, num_experts=4, head_dim=8),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=SHAPE["vocab_size"]),
}
IDS = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(3))
LENGTHS, PROMPTS = (9, 6, 9), (4, 2, 9)  # the last row is all prompt
MASK = torch.tensor([[int(i < n) for i in range(9)] for n in LENGTHS])
LABELS = torch.tensor(
    [
        [int(t) if p <= i < n else -100 for i, t in enumerate(row)]
        for row, p, n in zip(IDS, PROMPTS, LENGTHS, strict=True)
    ]
)
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def build(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model, in evaluation mode and so without dropout."""
    torch.manual_seed(seed)
    config = copy.deepcopy(HEADED[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)  # logits that differ, as a trained model's
    return model


def inner(model: PreTrainedModel) -> Tensor:
    """A weight of the first layer, on which everything behind it depends."""
    return next(p for n, p in model.named_parameters() if ".0." in n and p.dim() == 2)


def ours(model: PreTrainedModel, head: Head, base: PreTrainedModel | None = None, kl: float = 0.0) -> Tensor:
    mask, tokens = predicting(LABELS)
    kept = None if base is None else Head(base).run_body(base, BATCH)[mask].detach()
    return response_loss(head, head.run_body(model, BATCH)[mask], tokens, kept, kl).sum()


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", HEADED)
def test_loss_and_gradient_are_those_of_all_logits(name, rows, monkeypatch):
    model = build(name)
    monkeypatch.setattr(parts, "_BUDGET", 4 * model.config.vocab_size * rows)
    head, plain = head_of(model, IDS[0].tolist(), sums=True)
    assert plain
    wanted = model(**BATCH, labels=LABELS, num_items_in_batch=torch.tensor(5.0)).loss
    loss = ours(model, head) / 5
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, inner(model))[0] for x in (loss, wanted)]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_no_more_than_one_part_of_the_logits_is_made_at_a_time_and_none_of_the_prompt(monkeypatch):
    model, rows = build("untied"), []
    head, _ = head_of(model, IDS[0].tolist(), sums=True)
    monkeypatch.setattr(parts, "_BUDGET", 4 * model.config.vocab_size * 4)
    model.lm_head.register_forward_hook(lambda m, args, output: rows.append(output.shape[:-1].numel()))
    ours(model, head).backward()
    assert rows == [3, 4, 4, 1], "one token of each row, since some logits have to be; then all nine that are learned"


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "tied", "opt"])
def test_the_penalty_is_that_of_a_second_model(name, monkeypatch):
    model = build(name)
    base = copy.deepcopy(model)
    with torch.no_grad():
        inner(model).add_(torch.randn_like(inner(model)))
    monkeypatch.setattr(parts, "_BUDGET", 4 * model.config.vocab_size * 2)
    head, _ = head_of(model, IDS[0].tolist(), sums=True)
    whole, before = model(**BATCH).logits.double(), base(**BATCH).logits.double().detach()
    wanted = torch.zeros((), dtype=torch.double)
    for row in range(3):
        for t in range(8):
            if (token := int(LABELS[row, t + 1])) != -100:
                q, p = whole[row, t].log_softmax(0), before[row, t].log_softmax(0)
                wanted = wanted - q[token] + 0.7 * functional.kl_div(q, p, reduction="sum", log_target=True)
    loss = ours(model, head, base, 0.7)
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-5, atol=1e-5)
    assert loss.item() - ours(model, head).item() > 1e-3, "the penalty is there"
    gradients = [torch.autograd.grad(x, inner(model))[0] for x in (loss, wanted)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()


def test_a_loss_of_the_models_own_is_told_from_the_plain_one():
    ids = IDS[0].tolist()
    mixture = build("mixture", output_router_logits=True, router_aux_loss_coef=0.001)
    head, plain = head_of(mixture, ids, sums=True)
    assert head is not None
    assert not plain, "its loss has a term that balances the experts"
    averaging = build("tied")
    averaging.loss_function = lambda logits, labels, **_: functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    assert head_of(averaging, ids, sums=True)[1] is False
    assert head_of(build("tied"), ids, sums=False)[1] is False


def test_a_head_that_cannot_be_had_by_itself_is_told():
    model, beside = build("tied"), []
    model.model.layers[0].register_forward_hook(lambda m, args, output: beside.append(output.mean()))
    model.lm_head.register_forward_hook(lambda m, args, output: output * (beside.pop() if beside else 1.0))
    assert head_of(model, IDS[0].tolist(), sums=True) == (None, False)


def test_a_model_that_others_have_wrapped_is_left_as_it_was():
    model = build("tied")
    wrapped = model.model.forward
    model.model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    replaced = model.model.forward
    head, plain = head_of(model.train(), IDS[0].tolist(), sums=True)
    assert plain
    assert model.training
    ours(model, head)
    assert model.model.forward is replaced
    assert not model.model._forward_hooks


def test_a_batch_without_responses_costs_nothing_and_has_a_gradient():
    model = build("tied")
    head, _ = head_of(model, IDS[0].tolist(), sums=True)
    mask, tokens = predicting(torch.full_like(LABELS, -100))
    loss = response_loss(head, head.run_body(model, BATCH)[mask], tokens).sum()
    loss.backward()
    assert loss.item() == 0
    assert float(inner(model).grad.abs().max()) == 0
