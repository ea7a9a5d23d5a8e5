"""What share of a device's peak a stage reaches (benchmarks/big_models)."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from b2ray.config.load import parse
from benchmarks.big_models.peak import flops, shares
from benchmarks.speed.workloads import Work


def test_operations_are_those_of_both_halves_of_guidance_and_the_adapter():
    config = parse([]).config
    found = flops(config, torch.device("cpu"))
    unet = UNet2DConditionModel.from_pretrained(f"{config.model.path}/unet")
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(2, 4, size, size), torch.zeros(2), torch.zeros(2, 12, width))
    assert counter.get_total_flops() < found < 1.2 * counter.get_total_flops()


def test_a_way_back_counts_as_two_ways_there():
    asked = Work(sampled=10, scored_again=2, trained=3, pictures=5)
    found = shares(asked, 100, {"time/sample": 2.0, "time/update": 4.0}, peak=1000.0)
    assert found == {"sampling": pytest.approx(0.5), "learning": pytest.approx(0.275)}
