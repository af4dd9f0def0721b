"""Code in model folders runs only when asked for, and a run folder tells nothing of its environment."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from repo import train
from repo.common.errors import UserError
from repo.config.schema import Config, ScoringConfig
from repo.runs.model_card import model_card
from tests.support.run_folders import files, lines


def test_a_run_folder_holds_nothing_of_the_environment(options, tmp_path):
    secrets = {"HF_TOKEN": "hf_s3cr3tAAAA", "WANDB_API_KEY": "w4ndbs3cr3tBBBB", "MY_PASSWORD": "p4ssw0rdCCCC"}
    out = tmp_path / "run"
    command = [sys.executable, "-m", "repo.train", *options, "--loggers=[tensorboard]", f"--out={out}"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | secrets)
    content = files(out)
    assert content
    assert not [p for p, data in content.items() for value in secrets.values() if value.encode() in data]


REMOTE = """
from pathlib import Path
Path(__file__)
import os
open(os.environ["REMOTE_CODE_RAN"], "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_of_a_model_runs_only_when_asked_for(tiny_model, options, tmp_path, monkeypatch):
    folder, marker = shutil.copytree(tiny_model, tmp_path / "mine"), tmp_path / "ran"
    monkeypatch.setenv("REMOTE_CODE_RAN", str(marker))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "modeling_mine.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    command = [*options, f"--model.path={folder}", "--steps=1", f"--out={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="model.path: cannot load") as error:
        train.run_command(command)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    yaml = tmp_path / "trusting.yaml"
    yaml.write_text("trust_remote_code: true\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        train.run_command(["--config", str(yaml), *command])
    train.run_command([*command, "--trust-remote-code"])
    assert marker.exists()
    assert len(lines(tmp_path / "run")) == 1


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("what", ["model.path", "scoring.cost"])
def test_a_pickled_model_cannot_run_code(what, tiny_model, scorer_folder, options, tmp_path):
    source = tiny_model if what == "model.path" else scorer_folder
    folder, marker = shutil.copytree(source, tmp_path / "evil"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Evil(marker)}))
    with pytest.raises(UserError, match=f"{what}.*cannot load"):
        train.run_command([*options, f"--{what}={folder}", f"--out={tmp_path / 'run'}"])
    assert not marker.exists()


def test_names_in_the_model_card_stay_code():
    config = Config(scoring=ScoringConfig(reward="a`b``<script>\n# heading", cost="plain:f"))
    card = model_card(config, 3, [])
    line = next(x for x in card.splitlines() if x.startswith("Reward:"))
    assert line == "Reward: ``` a`b``<script> # heading ```. Cost: `plain:f`."
