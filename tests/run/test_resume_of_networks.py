"""Every network resumes bit for bit with every objective, those of the tests included."""

from pathlib import Path

import pytest
from reference.networks import TEST_NETWORKS
from support.inprocess import TINY, call_train, interrupted_after, make_tiny_data, results

from cvae.model.networks import NETWORKS
from cvae.model.objectives import OBJECTIVES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", [*NETWORKS, "convolutional", "two levels", "regularised"])
def test_resumed_is_undisturbed(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, network: str, objective: str
) -> None:
    """Ended after the baseline's epoch, and again after the CVAE's first; in its second no image is bent."""
    if network in TEST_NETWORKS:
        monkeypatch.setitem(NETWORKS, network, TEST_NETWORKS[network])
    words = ["--data", data, *TINY, "--runs", tmp_path, "--network", network, "--objective", objective]
    words += ["--particles", "2", "--average", "4", "--bend", "0.5", "--unbent-epochs", "1", "--free-epochs", "1.5"]
    assert call_train(*words, "--name", "whole")[::2] == (0, "")
    resume = ["--runs", tmp_path, "--resume", "parts"]
    with interrupted_after("baseline", 1):
        assert call_train(*words, "--name", "parts").code == 143
    with interrupted_after("cvae", 1):
        assert call_train(*resume).code == 143
    assert call_train(*resume)[::2] == (0, "")
    whole, parts = results(tmp_path / "whole"), results(tmp_path / "parts")
    assert [record["epoch"] for record in whole["metrics"]] == [1, 1, 2]
    for part in whole:
        assert parts[part] == whole[part], part
    first, second = (record[f"train_{objective}"] for record in whole["metrics"][1:])
    assert first != second
