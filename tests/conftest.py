"""Settings for every test process and its children; made before flwr is imported."""

import atexit
import os
import shutil
import tempfile
import warnings

from hypothesis import settings

# The same examples in every run; how long one takes is not what a test is about.
settings.register_profile("fedinfer", deadline=None, derandomize=True)
settings.load_profile("fedinfer")

_FLWR_HOME = tempfile.mkdtemp(prefix="fedinfer-tests-")
atexit.register(shutil.rmtree, _FLWR_HOME, ignore_errors=True)

os.environ.update(
    FLWR_HOME=_FLWR_HOME,
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",  # tests run side by side; BLAS threads would only fight for cores
)

# Other packages' deprecations at import time are not ours to fail on; later ones are.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import flwr.clientapp
    import flwr.serverapp  # noqa: F401
