"""Reinforcement learning with verifiable rewards: advantages, token weights, credit assignment for TRL and verl: planned, nothing is implemented yet."""
