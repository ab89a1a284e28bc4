"""A tokenizer and a language model so small that they are made on the spot: everything can be tried without a download.

The model has random weights. It learns simple rules from short texts within minutes on one core; it knows no language.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pref_opt._checks import check_choice, check_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["tiny_causal_lm", "tiny_tokenizer"]

_PAD, _START, _END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_SMALLEST = 259  # 256 bytes and three special tokens
_TEMPLATE = (
    "{% for m in messages %}" + _START + "{{ m['role'] }}\n{{ m['content'] }}" + _END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + _START + "assistant\n{% endif %}"
)


def tiny_tokenizer(texts: Iterable[str] = (), *, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a ChatML template, trained on `texts`.

    Args:
        texts: What it learns merges from; without any, every byte is a token.
        vocab_size: Most tokens it may have, >= 259.

    Returns:
        A tokenizer that pads on the right and ends sequences with `<|im_end|>`.

    Raises:
        ValueError: If `vocab_size` < 259.

    Examples:
        >>> from pref_opt.tiny import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(["yes no yes"])
        >>> tokenizer.decode(tokenizer("no")["input_ids"])
        'no'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_count("vocab_size", vocab_size, least=_SMALLEST)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, padding_side="right"
    )
    fast.chat_template = _TEMPLATE
    return fast


def tiny_causal_lm(
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: Literal["qwen2", "llama"] = "qwen2",
    hidden: int = 64,
    layers: int = 2,
    max_length: int = 2048,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Return a random causal language model for `tokenizer`, in evaluation mode and float32.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        architecture: Whose layers it has, `"qwen2"` or `"llama"`.
        hidden: Hidden size, a multiple of 8: 4 heads of even size.
        layers: Number of layers, >= 1.
        max_length: Longest sequence.
        seed: Seed of its weights; the global generator is left as it was.
        **config: Further fields of the configuration of transformers.

    Returns:
        A model of about 120,000 parameters with the default sizes.

    Raises:
        ValueError: If the architecture is unknown or a size is out of range.

    Examples:
        >>> from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer
        >>> model = tiny_causal_lm(tiny_tokenizer())
        >>> model.config.hidden_size, model.training
        (64, False)
    """
    import torch
    import transformers

    check_choice("architecture", architecture, ("qwen2", "llama"))
    check_count("hidden", hidden)
    check_count("layers", layers)
    check_count("max_length", max_length)
    if hidden % 8:
        raise ValueError(f"hidden must be a multiple of 8, got {hidden}")
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
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = make_model(make_config(**fields))
    model.train(False)
    return model
