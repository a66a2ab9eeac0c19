"""The rule by which what a backbone returns becomes one row an image."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dinofast.nn.features import features, pooled

PLAIN = nn.Identity()
ROWS, MAP, TOKENS = torch.randn(2, 5), torch.randn(2, 5, 3, 4), torch.randn(2, 6, 5)


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict whose entries are attributes, too."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (ROWS, ROWS),
        (MAP, MAP.mean((2, 3))),
        (TOKENS, TOKENS.mean(1)),
        ((ROWS, MAP), ROWS),
        ((MAP, None), MAP.mean((2, 3))),
        ([TOKENS], TOKENS.mean(1)),
        (namedtuple("Out", "logits aux")(ROWS, None), ROWS),
        ({"anything": MAP}, MAP.mean((2, 3))),
        ({"x_norm_clstoken": ROWS, "x_norm_patchtokens": TOKENS, "masks": None}, ROWS),
        (ModelOutput(last_hidden_state=TOKENS, pooler_output=ROWS), ROWS),
        (ModelOutput(last_hidden_state=MAP, pooler_output=ROWS[..., None, None]), ROWS),
        (ModelOutput(last_hidden_state=TOKENS, pooler_output=None), TOKENS.mean(1)),
        (SimpleNamespace(last_hidden_state=MAP, hidden_states=None), MAP.mean((2, 3))),
    ],
)
def test_what_is_pooled(output, wanted):
    torch.testing.assert_close(pooled(output, PLAIN), wanted)


def test_tokens_of_a_backbone_with_a_class_token_are_that_one():
    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = Embeddings()

        def forward(self, x):
            return {"last_hidden_state": TOKENS}

    assert torch.equal(features(Transformer(), torch.zeros(2, 3, 8, 8)), TOKENS[:, 0])


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (ROWS[0], r"float32 of shape \(5,\)"),
        (torch.randn(2, 5, 1, 3, 4), r"float32 of shape \(2, 5, 1, 3, 4\)"),
        (ROWS.long(), r"int64 of shape \(2, 5\)"),
        (ROWS.to(torch.complex64), r"complex64 of shape \(2, 5\)"),
        ({"low": MAP, "high": TOKENS}, r"a dict with low \(2, 5, 3, 4\), high \(2, 6, 5\)"),
        ([MAP, MAP], r"a list of \(2, 5, 3, 4\), \(2, 5, 3, 4\)"),
        ((MAP, MAP[..., :1]), r"a tuple of \(2, 5, 3, 4\), \(2, 5, 3, 1\)"),
        ((), "a tuple of nothing"),
        ({}, "a dict with nothing in it"),
        (None, "None"),
        (SimpleNamespace(logits=ROWS), "a types.SimpleNamespace"),
    ],
)
def test_what_is_refused_names_what_is_there(output, words):
    with pytest.raises(ValueError, match=f"returns {words}.*: expected features .B, D.*pooler_out"):
        pooled(output, PLAIN)
