"""The hub by stand-ins for its client: the suite has no network."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from httpx import ConnectTimeout
from huggingface_hub import constants, errors

from configs.checks import section
from deradiff import hub
from deradiff.data.sources import parquet_files
from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.scorers import check_spec
from deradiff.scorers.spec import ScorerSpec
from tests.support.tiny_pipelines import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cached copy of `org/base`, a pipeline; its folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--base"
    save_tiny("sd15", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


def test_the_cached_copy_serves_where_nobody_answers(cache):
    assert BaseModel("org/base").family.name == "sd15"
    assert hub.commit_of(BaseModel("org/base").index_file) == COMMIT
    repo, names = hub.listing("org/base")
    assert repo.endswith(COMMIT)
    assert "unet/config.json" in names


def test_nothing_is_waited_for(cache, monkeypatch):
    timeouts = []

    def no_answer(url, timeout):
        timeouts.append(timeout)
        raise ConnectTimeout("no network")

    def retries(*_, **__):
        pytest.fail("this one retries")

    monkeypatch.setattr("deradiff.hub.get_hf_file_metadata", no_answer)
    monkeypatch.setattr("deradiff.hub.hf_hub_download", retries)
    start = time.monotonic()

    message = r"org/none, which did not answer, and no copy is here \(ConnectTimeout\)"
    with pytest.raises(ValueError, match=message):
        _ = BaseModel("org/none").family
    with pytest.raises(ValueError, match=message):
        check_autoencoder("org/none")
    assert BaseModel("org/base").family.name == "sd15"

    assert time.monotonic() - start < 2
    assert len(timeouts) == 3
    assert all(timeout <= 10 for timeout in timeouts)


def test_an_answering_hub_is_asked_for_the_file(cache, monkeypatch):
    file = cache / "snapshots" / COMMIT / "model_index.json"
    answer = SimpleNamespace(commit_hash="new")
    monkeypatch.setattr("deradiff.hub.get_hf_file_metadata", lambda url, timeout: answer)
    monkeypatch.setattr("deradiff.hub.hf_hub_download", lambda repo, name, **_: str(file))
    assert BaseModel("org/other", "v2").family.name == "sd15"


@pytest.mark.parametrize("text", ["org/name", "org/name-1.0", "a_b/c.d"])
def test_a_hub_id_has_an_owner_and_a_name(text):
    assert hub.is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    ["name", "a/b/c", "", "/a", "./a", "../a", "~/a", "runs/a", "asset:shapes/base", "a b/c"],
)
def test_paths_and_assets_are_no_hub_ids(text):
    assert not hub.is_hub_id(text)


def test_a_file_outside_the_cache_is_of_no_commit(tmp_path):
    assert hub.commit_of(tmp_path / "model_index.json") is None
    assert hub.commit_of(tmp_path / "snapshots" / "file") is None


class GatedRepoError(OSError):
    """As the hub's client names it."""


def test_what_did_not_come_from_the_hub_is_told_with_a_remedy():
    sentence = hub.not_fetched("a scorer's checkpoint", "org/a", ConnectTimeout("no"), "checkpoint")
    assert sentence == (
        "a scorer's checkpoint was wanted from the hub, org/a, which did not answer, and no copy "
        "is here (ConnectTimeout): give checkpoint=<the folder of a copy>, or set HF_HOME to a "
        "cache that hf download org/a has filled where there is a network"
    )
    gated = hub.not_fetched("an anchor", "org/a", GatedRepoError(), "anchor")
    assert gated.endswith(
        "org/a, and its owner asks for an agreement: accept it there, and type hf auth login "
        "(GatedRepoError)"
    )


def test_errors_of_the_hubs_client_are_told_from_our_own():
    assert hub.is_hub_error(ConnectTimeout("no"))
    assert hub.is_hub_error(errors.EntryNotFoundError("no"))
    assert not hub.is_hub_error(RuntimeError("a bug of ours"))


def test_a_stage_names_its_own_key_for_a_local_copy(monkeypatch):
    def no_answer(*_, **__):
        raise ConnectTimeout("no network")

    monkeypatch.setattr("deradiff.hub.get_hf_file_metadata", no_answer)
    remedy = r"give model\.base=<the folder of a copy>, or set HF_HOME"
    with pytest.raises(ValueError, match=remedy), section("model"):
        BaseModel("org/none").check()
    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", no_answer)
    remedy = r"give scorers\.pickscore\.checkpoint=<the folder of a copy>, or set HF_HOME"
    with pytest.raises(ValueError, match=remedy), section("scorers.pickscore"):
        check_spec(ScorerSpec("pickscore"))
    monkeypatch.setattr("deradiff.data.sources.datasets.load_dataset_builder", no_answer)
    remedy = r"give data\.path=<the folder of a copy>, or set HF_HOME"
    with pytest.raises(ValueError, match=remedy), section("data"):
        parquet_files("org/pairs", "train")
