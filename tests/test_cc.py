"""Correlation congruence's teacher embedding: learned in every spot mode, or in none. Its formula:
test_distillers.py."""

import pytest
import torch

from sakd.configuration import build
from sakd.errors import ConfigError
from sakd.training import Trainer
from tests.conftest import take_step

KEY = "distiller.losses.cc.teacher_embedding"


def trainer(tiny, teacher_embedding: str, mode: str) -> Trainer:
    config = tiny("distiller=cc", f"{KEY}={teacher_embedding}", f"spot_mode={mode}")
    made = build.trainer(config, build.parts(config), torch.device("cpu"))
    made.prepare(build.dataset(config))
    return made


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.distillers["cc"].named_parameters()}


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_the_teacher_s_embedding_learns_as_its_key_says_whatever_the_mode(tiny, mode):
    first, after = {}, {}
    draws = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 1, 8, 8, generator=draws), torch.arange(16) % 10, torch.arange(16)
    for embedding in ("learned", "frozen"):
        made = trainer(tiny, embedding, mode)
        first[embedding] = weights(made)
        for _ in range(2):
            take_step(made, *batch)
        after[embedding] = weights(made)
    for name, start in first["learned"].items():
        assert torch.equal(first["frozen"][name], start)
        assert not torch.equal(after["learned"][name], start), name
        assert torch.equal(after["frozen"][name], start) == name.startswith("embed_teacher"), name


def test_another_word_for_it_is_refused_by_key(tiny):
    with pytest.raises(ConfigError, match=r"cc.teacher_embedding: found 'froze', .*Did you mean 'frozen'"):
        build.parts(tiny("distiller=cc", f"{KEY}=froze"))
