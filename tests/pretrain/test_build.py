"""What is refused when the parts of a run are put together."""

from types import SimpleNamespace
from typing import Any

import pytest

from datasets.errors import UserError
from objectives import objective_class
from objectives.base import Objective, Widths
from pretrain.build import check_written

WIDTHS = Widths(embed=6, image_tokens=8, text_tokens=8, vocabulary=20, temperature=False)


def objectives(*kinds: str) -> dict[str, Objective]:
    return {kind: objective_class(kind)(objective_class(kind).Config(), WIDTHS) for kind in kinds}


def test_texts_that_nothing_opens_are_not_to_be_written():
    opened: Any = SimpleNamespace(start=0)
    unopened: Any = SimpleNamespace(start=None)
    check_written(opened, objectives("siglip", "lm"))
    check_written(unopened, objectives("itc", "siglip"))
    with pytest.raises(UserError, match="objective 'lm' predicts texts from their start token"):
        check_written(unopened, objectives("siglip", "lm"))
