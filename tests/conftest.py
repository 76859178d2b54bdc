"""For all tests: a configuration folder of their own, so that no measurement of the developer's machine is read.

And one thread for each process: tests run side by side, a worker for each core, and torch would start in each of them
as many threads as there are cores. They wait for one another on cores that the other worker holds.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_configuration(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Processes that tests start inherit it."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("configuration"))


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a folder: reading its GGUF file takes long, so it is read once."""
    import torch

    from reports.demo import model_file
    from trainer.loading import find_source, load_config, load_model, load_tokenizer

    source, folder = find_source(str(model_file())), tmp_path_factory.mktemp("smollm2")
    # Float32 holds every value of the file.
    options = {"dtype": torch.float32, "attention": "eager", "device": torch.device("cpu"), "four_bit": None, "seed": 0}
    load_model(source, load_config(source), **options).save_pretrained(folder)  # type: ignore[arg-type]
    load_tokenizer(source).save_pretrained(folder)
    return folder
