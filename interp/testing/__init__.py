"""Contracts that every method keeps, as functions: prove a method of your own as this package proves its own.

- `check_detector`: an analysis finds the planted head, and not in a control.
- `check_invariances`: batches, padding and order of prompts change no score.
- `check_edit`: an edit acts where it says, the same in prefill and decode, and leaves nothing behind.
- `check_selector`: a key selector keeps the share of keys that it is given, and later tokens see these keys alone.
- `planted`: tiny models in which a known head does a known job.
- `families`: tiny random models of eleven decoder families.

Each check raises ContractError, an AssertionError that names what failed.
"""

from interp.testing import families, planted
from interp.testing.contract_error import ContractError
from interp.testing.detectors import check_detector, check_invariances, planted_prompts
from interp.testing.edits import check_edit
from interp.testing.selectors import check_selector

__all__ = [
    "ContractError",
    "check_detector",
    "check_edit",
    "check_invariances",
    "check_selector",
    "families",
    "planted",
    "planted_prompts",
]
