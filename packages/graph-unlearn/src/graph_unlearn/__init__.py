"""Delete nodes, edges or features from a trained graph neural network (GIF, GraphEraser baseline, attacks): planned, nothing is implemented yet."""
