import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Steps of a small model are too short to share among threads, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
