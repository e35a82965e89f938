import threading

import torch

from sparse_ops import ActiveSet
from sparse_ops.workspace import Workspace


def test_one_buffer_a_slot_grows_and_is_reused():
    workspace, like = Workspace(), torch.zeros(1, dtype=torch.float64)
    small = workspace.take("y", (2, 3), like)
    large = workspace.take("y", (4, 5), like)
    again = workspace.take("y", (5, 2), like)
    assert small.dtype == torch.float64
    assert large.shape == (4, 5)
    assert again.data_ptr() == large.data_ptr() != small.data_ptr()


def test_slots_dtypes_and_threads_do_not_share():
    workspace = Workspace()
    taken = [workspace.take(slot, (8,), torch.zeros(1, dtype=d)) for slot in "ab" for d in (torch.float32, torch.half)]
    other = threading.Thread(target=lambda: taken.append(workspace.take("a", (8,), torch.zeros(1))))
    other.start()
    other.join()
    assert len({tensor.data_ptr() for tensor in taken}) == 5


def test_a_workspace_belongs_to_one_pass():
    first, second = (ActiveSet.full(1, (1, 1)) for _ in range(2))
    assert first.workspace is first.down().workspace
    assert first.workspace is not second.workspace
