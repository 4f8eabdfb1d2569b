"""A prefill is the model, and its predictions are scored as torch scores them."""

from __future__ import annotations

import torch

from stem_compile.bench.prefill import CHUNK, Prefill, greedy, predictions
from tests.tiny import tiny_llama


def test_prefill_is_the_model() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 40))
    with torch.inference_mode():
        logits, hidden, cache = Prefill(model)(ids)
        whole = model(ids).logits
        torch.testing.assert_close(logits, whole[:, -1:])
        torch.testing.assert_close(model.lm_head(hidden), whole)
    assert cache.get_seq_length() == 40


def test_predictions_do_not_depend_on_the_chunks() -> None:
    tokens, head = 2 * CHUNK + 5, torch.nn.Linear(8, 30)
    hidden, ids = torch.randn(1, tokens, 8), torch.randint(0, 30, (1, tokens))
    predicted = predictions(hidden, head, ids)
    logits = head(hidden)[0, :-1].detach()
    torch.testing.assert_close(predicted.nll, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert torch.equal(predicted.top1, logits.argmax(-1))


def test_greedy_is_generate() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 20))
    with torch.inference_mode():
        logits, _, cache = Prefill(model)(ids)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert greedy(model, logits, cache, 4) == generated[0, 20:].tolist()
