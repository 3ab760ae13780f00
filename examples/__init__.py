"""Programs that use dot_optax. Flax, TensorFlow Datasets, Grain and Orbax live here, never in the library."""
