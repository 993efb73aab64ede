"""`--help` of the stages: every key says what it is, in words of its own."""

from collections import Counter

import pytest

from configs.keys import keys_of
from eval.config import EvalConfig
from sample.config import SampleConfig
from train.config import TrainConfig
from train.needs_config import NeedsConfig

SCHEMAS = [TrainConfig, SampleConfig, EvalConfig, NeedsConfig]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_has_a_meaning_of_its_own(schema):
    keys = list(keys_of(schema))
    assert not [key.name for key in keys if not key.meaning]
    uses = Counter(key.meaning for key in keys)
    assert not [key.name for key in keys if uses[key.meaning] > 1]
