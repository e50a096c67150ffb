"""One thread for all tests: the models are tiny, and two threads mostly wait for each other."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts "make test &" so, and the commands that the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def all_threads():
    """For the few tests with real work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
