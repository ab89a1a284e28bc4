"""Inverse-Hessian-vector products: solvers shared by graph-unlearn, llm-unlearn and recsys-losses: planned, nothing is implemented yet."""
