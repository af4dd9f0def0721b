"""Fixtures: trainers of a class on fresh copies of the tiny model."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Each train() collects garbage twice; what was imported up to here need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make(tiny_model, tmp_path):
    """Make a trainer of a class on a fresh copy of the tiny model."""

    from . import trainers

    def build(trainer=trainers.RePOTrainer, model=None, rewards=trainers.letters, **fields):
        others = {name: fields.pop(name) for name in ("cost_funcs", "peft_config") if name in fields}
        config = trainers.config_of(trainer)
        return trainer(
            str(tiny_model) if model is None else model,
            rewards,
            config(output_dir=str(tmp_path / "out"), **trainers.SETTINGS | fields),
            trainers.questions(),
            processing_class=trainers.TOKENIZER,
            **others,
        )

    return build
