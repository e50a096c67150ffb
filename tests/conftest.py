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


@pytest.fixture(params=["library", "PyTorch"])
def cpu_form(request):
    """What runs between the products on a CPU: the library built on first use, then PyTorch's operators."""
    from csm_kernels.cpu import native

    if request.param == "PyTorch":
        with native.left_out():
            yield request.param
    elif not native.is_built():
        pytest.skip(native.describe_library())
    else:
        yield request.param
