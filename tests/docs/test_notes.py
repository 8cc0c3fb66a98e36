"""What the documents say of the method and of the paper's settings is what the code does."""

from __future__ import annotations

import math
import re

import torch
from doc_checks import ROOT
from torch import nn

from saae_train.config import HELD_OUT, preset
from saae_train.fitting import memory as fitting
from saae_train.model.memory import CANDIDATES, NEIGHBOURS, SEARCH
from saae_train.model.saae import SAAE, TransformerDecoder, TransformerEncoder

NUMBERS = {4: "four", 8: "eight", 16: "sixteen"}


def said(page: str) -> str:
    """A page on one line."""
    return re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text(encoding="utf-8"))


def test_tables_say_how_the_baseline_differs_from_its_own_code() -> None:
    dfr, paper = preset("dfr"), preset("paper")
    assert (dfr.keep, dfr.loss, dfr.batch) == (paper.keep, paper.loss, paper.batch)
    assert dfr.loss == "l2"
    assert f"(V at {dfr.keep:.0%}".replace("%", " %") in said("tables.md")
    assert f"batch {dfr.batch}). DFR's own code keeps 90 % and uses the mean squared error and batches of 4." in said(
        "tables.md"
    )


def test_tables_say_how_many_images_the_papers_presets_leave_for_the_fit() -> None:
    assert {preset(name).held_out for name in ("paper", "cae", "vgg19", "dfr")} == {HELD_OUT}
    share = f"{HELD_OUT:.0%}".replace("%", " %")
    assert f"{share} of the normal images are held out to calibrate T" in said("tables.md")
    assert f"fitted on {share} fewer images" in said("tables.md")


def test_tables_say_what_an_epoch_is_and_what_it_is_not() -> None:
    assert "**An epoch** is ceil(images / batch) steps" in said("tables.md")
    assert "A pass may end in the middle of a batch" in said("tables.md")
    assert f"batch {preset('paper').batch}, {preset('paper').epochs} epochs" in said("design.md")


def test_design_lists_the_choices_that_the_paper_leaves_open() -> None:
    text = said("design.md")
    listed = text[text.index("The paper does not give some details.") :][:600]
    model = SAAE(20, 6, 12)
    assert "pre-norm" in listed
    assert "final norms" in listed
    for block in (model.transformer_encoder, model.transformer_decoder):
        assert isinstance(block, TransformerEncoder | TransformerDecoder)
        assert isinstance(block.norm1, nn.LayerNorm)
        with torch.no_grad():  # the last thing that a block does is to normalise
            block.norm.weight.fill_(0.0)
            block.norm.bias.fill_(3.0)
    memory = model.transformer_encoder(torch.randn(1, 12, 6))
    assert bool((memory == 3.0).all())
    assert bool((model.transformer_decoder(model.queries, memory, model.position) == 3.0).all())
    assert "GELU" in listed
    assert sum(isinstance(module, nn.GELU) for module in model.modules()) == 2
    assert "no dropout" in listed
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert "so to values as well as keys" in listed
    decoder = SAAE(20, 6, 12).transformer_decoder
    silent = torch.zeros(1, 12, 6)  # without values nothing but the position could tell two encodings apart
    with torch.no_grad():
        decoder.cross_attention.key_value.weight[:6].zero_()  # keys see nothing: every weight is the same
        moved = decoder(silent, silent, torch.ones(1, 12, 6)) - decoder(silent, silent, torch.zeros(1, 12, 6))
    assert float(moved.abs().max()) > 1e-3


def test_design_says_what_the_memory_is() -> None:
    config, text = preset("fast"), said("design.md")
    assert f"at most {config.memory} of them" in text
    assert f"{fitting._POOL:,}" in text
    assert f"the leading {SEARCH} components" in text
    assert f"{NUMBERS[CANDIDATES]} entries" in text
    assert f"The {NUMBERS[NEIGHBOURS]} nearest count" in text
    assert f"its {NUMBERS[fitting._POOLED]} neighbours" in text
    assert f"spreads {fitting._SHARE} times" in text
    gflop = 2e-9 * math.prod(size // 14 for size in config.input_size) * (config.memory or 0) * SEARCH
    assert f"This takes {gflop:.1f} GFLOP" in text
