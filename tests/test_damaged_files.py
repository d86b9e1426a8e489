"""Files that are damaged at random end in an error of the library or in what they said before, and soon."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.blocks import HypothesisSource
from tests.damaged_files import KINDS, check_damaged


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_refused_in_our_own_words(kind: str, data: st.DataObject) -> None:
    check_damaged(kind, HypothesisSource(data.draw))
