"""`ballast bench`: cases, runner, results store, statistics and report over the Ballast packages."""
