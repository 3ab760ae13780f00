"""What one process of a session compiles, no other has to."""

import atexit
import os
import shutil
import tempfile

_MADE = "DOT_OPTAX_TESTS_SHARE_COMPILED_PROGRAMS"


def share_compiled_programs():
    """Gives all processes that this one starts, and itself if it has not imported JAX yet, a cache that ends with it.

    The first process of a session makes it; pytest's workers and the commands that they run inherit it.
    """
    if _MADE not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled")
        os.environ[_MADE] = "1"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
