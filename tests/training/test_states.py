"""States of optimisers in checkpoints: tensors, and nothing that runs."""

import pytest
import torch

from deradiff.training.sharding import read_tensors


class Payload:
    """What would make a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (type(self.folder).mkdir, (self.folder,))


def test_a_state_with_a_payload_is_refused_and_not_run(tmp_path):
    file = tmp_path / "optimizer.pt"
    torch.save({"state": {}, "param_groups": [Payload(tmp_path / "made")]}, file)
    with pytest.raises(ValueError, match=r"optimizer\.pt is no state .*remove its folder"):
        read_tensors(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", b"\x80\x02}q\x00.", b"text"])
def test_a_torn_state_is_named(tmp_path, content):
    file = tmp_path / "scaler.pt"
    file.write_bytes(content)
    try:
        assert read_tensors(file) == {}
    except ValueError as error:
        assert "scaler.pt" in str(error)
