import pytest
import torch
from torch.testing import assert_close

from stepdistill.batch import Batch
from stepdistill.method import Losses, Method, Phase
from stepdistill.networks.network import Network
from stepdistill.randomness import StepRandom


class Nothing(Method):
    def networks(self) -> dict[str, Network]:
        return {}


def test_the_total_is_the_sum_of_the_terms_with_their_graphs() -> None:
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    losses = Losses({"square": a**2, "triple": 3 * b}, metrics={"not_in_it": torch.tensor(100.0)})
    assert losses.total.shape == () and losses.count == 1.0
    assert_close(losses.total.detach(), torch.tensor(13.0))
    losses.total.backward()
    assert_close((a.grad, b.grad), (torch.tensor(4.0), torch.tensor(3.0)))


def test_a_method_of_one_phase_trains_its_student_on_every_step() -> None:
    method = Nothing()
    (phase,) = method.phases()
    assert (phase.trains, phase.every, phase.loss) == (("student",), 1, method.training_step)
    assert method.next_round() is False and method.state_dict() == {} and method.step == 0
    assert method.after_step() is None and method.coming() == ()


def test_a_method_without_a_loss_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"Nothing must write training_step\(\) or phases\(\)"):
        Nothing().training_step(Batch(None, {}, {}, StepRandom(0, 0, [0])))


def test_state_of_another_method_is_refused() -> None:
    Nothing().load_state_dict({})
    with pytest.raises(ValueError, match=r"keeps no state, got \['rungs'\]"):
        Nothing().load_state_dict({"rungs": [8, 4]})


def test_networks_must_be_named() -> None:
    with pytest.raises(TypeError):
        Method()  # type: ignore[abstract]


def test_phases_cannot_be_changed_after_they_were_made() -> None:
    phase = Phase(("student",), Nothing().training_step)
    with pytest.raises(AttributeError):
        phase.every = 2  # type: ignore[misc]
