"""The small chat model of the tests of runs, one for each module."""

import pytest
import tiny_chat_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_chat_model.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model.model()
