"""The test kit of the Ballast workspace: golden runner, loss battery, pytest plug-in, gloo helper.

Depends on pytest alone; torch and numpy are imported by the functions that need them. Never published.

| module | use |
|---|---|
| `ballast_testing.golden` | `python -m ballast_testing.golden DIR`, `golden_cases`, `check_case`, `run_directory` |
| `ballast_testing.losses` | `check_loss`: the battery that every loss runs through |
| `ballast_testing.distributed` | `run_gloo`: a function on several gloo processes |
| `ballast_testing.plugin` | loaded by pytest: one thread, `data_root`, skips for `gpu` and `network` |
"""
