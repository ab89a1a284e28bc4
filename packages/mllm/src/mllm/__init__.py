"""Multimodal reinforcement, preference and unlearning methods on transformers vision-language models: planned, nothing is implemented yet."""
