"""Memory that is used again where it fits, and made anew where it does not."""

import torch
from fogzo.probing.buffers import Buffers

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_same_user_gets_the_same_memory_again_and_another_gets_its_own():
    buffers = Buffers()
    first = buffers.empty("a", (3, 4), torch.float32, CPU)
    assert buffers.empty("a", (3, 4), torch.float32, CPU) is first
    assert buffers.empty("b", (3, 4), torch.float32, CPU) is not first


def test_what_no_longer_fits_is_made_anew():
    buffers = Buffers()
    first = buffers.empty("a", (3, 4), torch.float32, CPU)
    for shape, dtype in [((4, 3), torch.float32), ((3, 4), torch.float64)]:
        made = buffers.empty("a", shape, dtype, CPU)
        assert made is not first and made.shape == shape and made.dtype == dtype


def test_a_copy_has_its_models_strides():
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    copy = Buffers().empty_like("a", like)
    assert copy.stride() == like.stride() and not copy.requires_grad


def test_other_devices_keep_nothing_and_get_nothing_of_another_device():
    buffers = Buffers()
    like = torch.empty(3, 4)
    kept = buffers.empty_like("a", like)
    moved = buffers.empty_like("a", like.to(META))  # as after model.to(device)
    assert moved.device == META
    assert buffers.empty_like("a", like.to(META)) is not moved
    assert buffers.empty_like("a", like) is not kept
