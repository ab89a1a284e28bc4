from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pref_opt.alignment_potential import TransformersGenerator, score_preferences
from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

pytestmark = pytest.mark.gpu

NORMS = ("chosen_logps_norm", "rejected_logps_norm")


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": "the sum of " * (i % 4) + f"{i} is", "chosen": " four" * (i % 3 + 1), "rejected": f" no {i}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["the sum of two and two is four"] * 2)


def test_scores_of_the_gpu_are_those_of_the_cpu(tokenizer):
    model = tiny_causal_lm(tokenizer)
    cpu = score_preferences(model, rows(40), tokenizer, device="cpu")
    gpu = score_preferences(model, rows(40), tokenizer, device="cuda")
    assert model.device.type == "cuda"
    for name in NORMS:
        np.testing.assert_allclose(gpu[name], cpu[name], atol=1e-4, rtol=0)


def test_a_batch_does_not_change_scores(tokenizer):
    model = tiny_causal_lm(tokenizer).cuda()
    one, eight = (score_preferences(model, rows(20), tokenizer, batch_size=size) for size in (1, 8))
    for name in NORMS:
        np.testing.assert_allclose(one[name], eight[name], atol=1e-5, rtol=0)


def test_half_precision_sums_in_single_precision(tokenizer):
    model = tiny_causal_lm(tokenizer)
    single = score_preferences(model, rows(20), tokenizer, device="cuda")
    half = score_preferences(model.to(torch.bfloat16), rows(20), tokenizer, device="cuda")
    for name in NORMS:
        np.testing.assert_allclose(half[name], single[name], atol=0.05, rtol=0)
    # bf16 holds 8 bits: sums that had been rounded to it would all be multiples of 2**-4 at this size
    assert any(value * 16 != round(value * 16) for value in half["chosen_logps"] if abs(value) > 16)


def test_logits_are_never_held_as_a_whole(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=131072, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).cuda()
    data = [{"prompt": "a", "chosen": "b" * 1000, "rejected": "c" * 1000}] * 8
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    score_preferences(model, data, tokenizer, batch_size=8)
    logits = 16 * 1000 * config.vocab_size * 4  # 8 GB in float32
    assert torch.cuda.max_memory_allocated() - before < logits / 8


def test_generation_depends_on_its_seed_alone(tokenizer):
    generate = TransformersGenerator(tiny_causal_lm(tokenizer), tokenizer, device="cuda")
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "top_p": 0.9, "max_tokens": 5}
    state = torch.cuda.get_rng_state()
    first = generate(["the sum", "two"], **options, seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.cuda.manual_seed(3)
    assert generate(["the sum", "two"], **options, seed=1) == first
    assert generate(["the sum", "two"], **options, seed=2) != first
    for row in first:
        assert all(np.isfinite(logp) and logp < 0 for _, logp in row)
