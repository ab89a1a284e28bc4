"""Separators for long numeric sequences in language-model prompts, with diagnostics: planned, nothing is implemented yet."""
