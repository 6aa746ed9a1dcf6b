"""Prompts of the planted jobs, token by token."""

import torch

PAD, BOS, EOS, FIRST_WORD, VOCAB = 0, 1, 2, 3, 64
HARM, NO = 60, 61
END = 62
ANSWER = 4
DOCUMENTS, OPTIONS = 4, 12


def draw_number(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=rng))


def draw_words(rng: torch.Generator, count: int, skip: tuple[int, ...] = (), distinct: bool = False) -> list[int]:
    pool = [word for word in range(FIRST_WORD, VOCAB) if word not in skip]
    order = torch.randperm(len(pool), generator=rng) if distinct else torch.arange(len(pool))
    picks = order[:count] if distinct else torch.randint(len(pool), (count,), generator=rng)
    return [pool[int(i)] for i in picks]


def repeated(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    n = draw_number(rng, 18, 28)
    words = draw_words(rng, 2 * n, distinct=True)
    second = words[n:] if shuffled else words[:n]
    return [BOS, *words[:n], *second], {"first": ((1, n + 1),), "second": ((n + 1, 2 * n + 1),)}, {"n": n}


def needle(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    key, other, *answer = draw_words(rng, 2 + ANSWER, distinct=True)
    hay = [draw_words(rng, draw_number(rng, 10, 25), skip=(key, other, *answer)) for _ in range(2)]
    start = 1 + len(hay[0])
    ids = [BOS, *hay[0], key, *answer, EOS, *hay[1], other if shuffled else key]
    spans = {
        "context": ((1, len(ids) - 1),),
        "needle": ((start, start + 1 + ANSWER),),
        "answer": ((start + 1, start + 1 + ANSWER),),
        "question": ((len(ids) - 1, len(ids)),),
    }
    return ids, spans, {"answer_ids": answer}


def doubles(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    words = draw_words(rng, draw_number(rng, 40, 56), distinct=True)
    half = len(words) // 2
    if not shuffled:
        # in a new order, so that no other relation than equality holds between the halves
        words[half:] = [words[int(i)] for i in torch.randperm(half, generator=rng)]
    return [BOS, *words], {}, {}


def documents(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    key, other, answer = draw_words(rng, 3, distinct=True)
    gold = draw_number(rng, 0, DOCUMENTS)
    ids, places = [BOS], []
    for number in range(DOCUMENTS):
        words = draw_words(rng, draw_number(rng, 8, 16), skip=(key, other, answer))
        if number == gold:
            words[4:4] = [key, answer]
        places.append((len(ids), len(ids) + len(words)))
        ids += words
    ids.append(other if shuffled else key)
    return ids, {"documents": tuple(places), "gold": (places[gold],), "query": ((len(ids) - 1, len(ids)),)}, {}


def options(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    other, *words = draw_words(rng, 1 + OPTIONS, skip=(END,), distinct=True)
    right = draw_number(rng, 0, OPTIONS)
    ids, places = [BOS, *draw_words(rng, draw_number(rng, 2, 12), skip=(END, other, *words))], []
    for word in words:
        places.append((len(ids), len(ids) + 2))
        ids += [word, END]
    return [*ids, other if shuffled else words[right]], {"options": tuple(places)}, {"option": right}


def random_words(rng: torch.Generator, shuffled: bool) -> tuple[list[int], dict, dict]:
    return [BOS, *draw_words(rng, draw_number(rng, 30, 60))], {}, {}
