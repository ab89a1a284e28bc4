"""Generative and LLM recommenders (MiniOneRec, iLoRA, CETRec) on transformers and peft: planned, nothing is implemented yet."""
