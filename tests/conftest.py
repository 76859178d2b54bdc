"""For all tests: a configuration folder of their own, so that no measurement of the developer's machine is read.

And one thread for each process: tests run side by side, a worker for each core, and torch would start in each of them
as many threads as there are cores. They wait for one another on cores that the other worker holds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_configuration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Processes that tests start inherit it."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("configuration"))
