"""What every test may rely on: no network, one thread a worker, an empty cache, and `shared_data` if it is there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Set what the libraries read when they are imported; the command lines that tests start inherit it."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty `ALIGNLAB_CACHE` for this worker, instead of the user's own."""
    folder = tmp_path_factory.mktemp("alignlab-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGNLAB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data slices: `$ALIGNLAB_SHARED_DATA`, else `shared/data` beside the checkout, else a skip."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ALIGNLAB_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ALIGNLAB_SHARED_DATA to a folder that has some")
    return folder
