r"""Inverse-Hessian-vector products for trained models: exact Hessian products, solvers, and what says when not to trust them.

$$(H+\lambda I)\,\delta=b,\qquad\theta_{\text{new}}=\theta+\delta$$

`ihvp.hvp` multiplies by the Hessian of a loss, `ihvp.operators` by that of a whole data set, `solve` inverts,
`extreme_eigenvalues` helps to choose the damping, `apply_delta` makes the step. Documentation:
`docs/papers/ihvp/solvers.md`.
"""

from ihvp import hvp, operators, solvers, spectrum
from ihvp._delta import apply_delta
from ihvp.hvp import make_hvp, module_loss
from ihvp.operators import DataHVP, StochasticHVP
from ihvp.solvers import ConvergenceWarning, SolveResult, cg, direct, lanczos, lissa, neumann, quadratic_sgd, solve
from ihvp.spectrum import extreme_eigenvalues, largest_eigenvalue

__all__ = [
    "ConvergenceWarning",
    "DataHVP",
    "SolveResult",
    "StochasticHVP",
    "apply_delta",
    "cg",
    "direct",
    "extreme_eigenvalues",
    "hvp",
    "lanczos",
    "largest_eigenvalue",
    "lissa",
    "make_hvp",
    "module_loss",
    "neumann",
    "operators",
    "quadratic_sgd",
    "solve",
    "solvers",
    "spectrum",
]
