"""Graph classifiers and clustering that survive distribution shift (CAL, AIA, InfoIGL, ASRC) on PyTorch Geometric: planned, nothing is implemented yet."""
