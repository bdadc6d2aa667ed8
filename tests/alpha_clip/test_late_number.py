import pytest
import torch

from alpha_clip.late_number import LateNumber


def test_it_is_the_number_of_that_moment_without_its_gradient() -> None:
    value = torch.tensor(2.5, requires_grad=True)
    assert LateNumber(value).read() == 2.5
    assert LateNumber(torch.tensor(torch.inf)).read() == float("inf")


def test_what_fsdp_splits_is_joined() -> None:
    class Split(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            return torch.tensor(7.0)

    assert LateNumber(torch.tensor(1.0).as_subclass(Split)).read() == 7.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reading_does_not_wait_for_what_came_later() -> None:
    late = LateNumber(torch.ones((), device="cuda") * 3)
    torch.cuda._sleep(10**9)
    behind = torch.cuda.Event()
    behind.record()
    assert late.read() == 3
    assert not behind.query()
