"""What each judge accepts and refuses, by hand."""

import pytest

from interp.analyses import tasks
from interp.analyses.tasks import judges
from interp.hooks.prompts.prompts import Prompt


def prompt(**meta):
    return Prompt("", (0,), {}, {"right": [], "wrong": [], **meta})


BIO = prompt(answer="tour guide")
ROME = prompt(right=[" Rome"], wrong=[" Paris", " New Rome"])
THEY = prompt(answer="They repair old clocks.")
OTHERS = ("he", "her", "his", "him", "hers", "herself")
PICK = prompt(right=[" B"], wrong=[" A", " C", " D"])
TABLE = [
    ("json", BIO, '{"name": "Ida", "occupation": "tour guide"}', True),
    ("json", BIO, 'Sure!\n```json\n{\n "Occupation": "Tour Guide"\n}\n``` Done.', True),
    ("json", BIO, '{"person": {"name": "Ida", "occupation": "a tour guide"}}', True),
    ("json", BIO, '{broken {"occupation": "tour guide"}', True),
    ("json", BIO, '{"name": "{Ida}", "occupation": "tour guide"}', True),
    ("json", BIO, "{'name': 'Ida', 'occupation': 'tour guide'}", False),
    ("json", BIO, '{"name": "Ida", "occupation": "tour guide"', False),
    ("json", BIO, '{"name": "tour guide", "occupation": "baker"}', False),
    ("json", BIO, '{"job": "tour guide"}', False),
    ("json", BIO, '{"occupation": "guide"}', False),
    ("json", BIO, '{"occupation": "tour operator"}', False),
    ("json", BIO, '{"occupation": "detour guide"}', False),
    ("json", BIO, '["occupation", "tour guide"]', False),
    ("pronoun", THEY, " They repair old clocks.", True),
    ("pronoun", THEY, "THEY REPAIR CLOCKS, where others shed theirs.", True),
    ("pronoun", THEY, "She repairs old clocks.", False),
    ("pronoun", THEY, "They repair old clocks, as SHE said.", False),
    ("pronoun", THEY, "They repair old clocks; she's good.", False),
    ("pronoun", THEY, "They repair clocks by himself", False),
    *[("pronoun", THEY, f"They repair old clocks {word}", False) for word in OTHERS],
    ("pronoun", THEY, "They do.", False),
    ("pronoun", THEY, "", False),
    ("counterfact", ROME, " Rome.", True),
    ("counterfact", ROME, "now in ROME, no longer in Paris", True),
    ("counterfact", ROME, "Paris, not Rome", False),
    ("counterfact", ROME, "New Rome", False),
    ("counterfact", ROME, "Romeo", False),
    ("counterfact", ROME, "Berlin", False),
    ("choice", PICK, " B. Paris", True),
    ("choice", PICK, "(B)", True),
    ("choice", PICK, "The answer: B, not A", True),
    ("choice", PICK, "**B**", True),
    ("choice", PICK, "E or B", True),
    ("choice", PICK, "ABC asks; B", True),
    ("choice", PICK, "A", False),
    ("choice", PICK, "D'Artagnan, BBC", False),
    ("choice", PICK, "b", False),
    ("contains", ROME, "Paris, not Rome", True),
    ("contains", ROME, "Paris", False),
    ("starts", ROME, " rome, of course", True),
    ("starts", ROME, "It is Rome", False),
    ("first", ROME, "It is Rome", True),
    ("first", prompt(right=["New York"], wrong=["New York City"]), "New York City", False),
    ("first", prompt(right=["New York City"], wrong=["New York"]), "New York City", True),
    ("first", prompt(right=["x"], wrong=["x"]), "x", False),
    ("first", prompt(right=["!"], wrong=["?"]), "?!", False),
    ("letter", PICK, "B", True),
    ("json judge", ROME, 'so: {"a": {}}', True),
    ("json judge", ROME, "{a: 1}", False),
]


@pytest.mark.parametrize(("name", "p", "reply", "verdict"), TABLE)
def test_judges(name, p, reply, verdict):
    if name == "json judge":
        assert judges.valid_json(reply, p) is verdict
    else:
        judge = tasks.get(name).judge if name in tasks.names() else judges.JUDGES[name]
        assert judge(reply, p) is verdict
