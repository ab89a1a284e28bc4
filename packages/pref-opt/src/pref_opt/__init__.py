"""Preference-optimisation losses and trainers on TRL (beta-DPO, Dr.DPO, alpha-DPO, gamma-PO, RePO, NaPO, ...): planned, nothing is implemented yet."""
