"""What the tests compare with: optimizers written in NumPy, and trajectories of the published implementation."""
