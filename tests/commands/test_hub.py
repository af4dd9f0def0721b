"""A mistyped model or data set is refused at once: no such folder, and on the hub where the name can be one of its."""

import httpx
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from repo.common.errors import UserError
from repo.common.hub import require_data_set, require_model
from repo.data.prompts import load_prompts


def test_a_folder_and_a_cached_model_are_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    require_model(str(tmp_path), "model.path")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    require_model("owner/model", "model.path")


@pytest.mark.parametrize("name", ["/data/modl", "./modl", "../modl", "~nobody/modl", "runs/mine/fnal", "runs/"])
def test_a_path_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"^model.path: no such folder: '{name}'$"):
        require_model(name, "model.path")


def test_a_name_is_asked_of_the_hub_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def answer(error):
        def model_info(_, name, timeout):
            asked.append(name)
            if error is not None:
                raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)

    answer(None)
    require_model("owner/model", "model.path")
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    answer(RepositoryNotFoundError("404", response=response))
    with pytest.raises(UserError, match="model.path: no such folder, and no such model on the hub: 'owner/modl'"):
        require_model("owner/modl", "model.path")
    answer(ConnectionError("no route"))
    with pytest.raises(UserError, match=r"no such folder: 'owner/modl', and the hub does not answer \(ConnectionError"):
        require_model("owner/modl", "model.path")
    assert asked == ["owner/model", "owner/modl", "owner/modl"]


def test_offline_the_cache_decides(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such folder: 'owner/modl', nor is it in the hub's cache"):
        require_model("owner/modl", "model.path")


def test_a_data_set_is_asked_of_the_hub_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    asked = []

    def dataset_info(_, name, timeout):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked again and again"))
    with pytest.raises(UserError, match=r"no such folder: 'data/trian', and the hub does not answer \(ConnectionError"):
        load_prompts("data/trian#train")
    assert asked == ["data/trian"]
    (tmp_path / "owner___my-set").mkdir()
    require_data_set("owner/my-set")
    assert asked == ["data/trian"]
