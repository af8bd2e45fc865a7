"""Settings for every test: offline, quiet third parties, and the shared inputs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Every model of these tests is made here or installed; nothing may be looked up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts what runs in its background with Ctrl-C ignored, and so would be all that tests
# start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Others' deprecations that are none of lorafast's; everything else that warns is an error.
THIRD_PARTY_WARNINGS = [
    # PEFT asks transformers 5 for an attribute by its older name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # One of the test's patterns is meant to match nothing.
    "ignore:The following alpha_pattern keys did not match any:RuntimeWarning:peft",
    # PEFT sets a wrong flag right, and says so.
    "ignore:fan_in_fan_out is set to:UserWarning:peft",
]

PROJECT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of adapters that others trained; tests that need it are skipped without it."""
    given = os.environ.get("LORAFAST_TEST_DATA")
    folder = Path(given) if given else PROJECT.parent / "shared" / "data"
    if not (folder / "adapters").is_dir():
        pytest.skip("no real adapters: set LORAFAST_TEST_DATA to a folder that holds adapters/")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Bases and adapters, each made on first use and shared by the session. Read-only."""
    return Models(tmp_path_factory.mktemp("models"))


from support.models import Models  # noqa: E402 (the environment has to be set before)
