"""Delete or correct training instances of LoRA-tuned language models (LLM Eraser, TCFT): planned, nothing is implemented yet."""
