"""What one process of a session compiles, no other has to."""

import atexit
import os
import shutil
import tempfile


def share_compiled_programs():
    """Gives this process, and all that it starts, a common JAX compilation cache that ends with it."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
