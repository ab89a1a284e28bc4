"""The tiny language models of `pref_opt.tiny`, for tests of packages that don't depend on pref-opt themselves.

Needs the extra `llm` (pref-opt, tokenizers and transformers).
"""

from __future__ import annotations

from pref_opt.tiny import tiny_causal_lm, tiny_tokenizer

__all__ = ["tiny_causal_lm", "tiny_tokenizer"]
