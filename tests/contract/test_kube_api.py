"""The fake keeps what the real API promises; tests/cluster/test_launcher_contract.py asks the real one."""

from collections.abc import Callable

import pytest

from tests.contract import kube_api as contract
from tests.fakes.kubernetes import FakeKubeApi


def at_once(true: Callable[[], bool]) -> None:
    assert true()


@pytest.mark.parametrize("kuberay", [True, False])
def test_the_fake_keeps_the_contract(kuberay: bool) -> None:
    contract.objects_are_made_found_and_deleted(FakeKubeApi(kuberay=kuberay), at_once)
    contract.what_is_not_there_is_said_so(FakeKubeApi(kuberay=kuberay))
    contract.groups_are_known(FakeKubeApi(kuberay=kuberay))
    contract.a_body_that_is_wrong_is_refused(FakeKubeApi(kuberay=kuberay))
