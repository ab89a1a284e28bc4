"""A tokenizer and language models so small that a test builds them in milliseconds; nothing is downloaded.

Needs the extra `llm` (tokenizers and transformers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["tiny_causal_lm", "tiny_tokenizer"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(texts: Iterable[str] = (), *, vocab_size: int = 323) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a ChatML template, trained on `texts`.

    Args:
        texts: Text to learn merges from; without any, every byte is a token.
        vocab_size: Most tokens it may have, at least 259.

    Returns:
        A tokenizer that pads on the right and ends sequences with `<|im_end|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, _, end = special
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_causal_lm(
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: Literal["qwen2", "llama"] = "qwen2",
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Return a random causal language model for `tokenizer`, in evaluation mode, float32.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        architecture: Whose layers it has.
        hidden: Hidden size, a multiple of 4.
        layers: Number of layers.
        seed: Seed of its parameters; the global generator is left as it was.
        **config: Further fields of the transformers configuration.
    """
    import torch
    import transformers

    make_config, make_model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[architecture]
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make_model(make_config(**fields)).eval()
    return model
