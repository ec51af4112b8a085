"""What every test shares: the folder of recordings, which only developers and CI have, and what makes tests quick."""

import gc
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_xdist_worker():
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_searched_for_garbage():
    """accelerate collects garbage after every training: most of a tiny run, through 440,000 imported objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with recordings of the original code and its real vocabulary; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(
            f"{SHARED} is absent: it holds recordings of the original code that are not part of this repository"
        )
    return SHARED
