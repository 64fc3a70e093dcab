"""The DNA task: motifs, grammar, generator, splits, oracles, reward and metrics."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import re
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch

from rescore.models.fit import Fit
from rescore.models.tiny import TableDenoiser
from rescore.rewards.reward import RewardError
from rescore.tasks import dna, dna_metrics, dna_sequences
from rescore.tasks.dna import Dna, FittedOracle
from rescore.tasks.dna_sequences import (
    ACTIVATORS,
    LENGTH,
    LETTERS,
    PAIRS,
    REPRESSORS,
    Grammar,
    background,
    known_patterns,
    letter_laws,
    membership,
    motifs,
    occupancy,
    reverse_complement,
    site_counts,
    true_accessibility,
    true_activity,
)

SMALL = Grammar(sequences=400, seed=3)
QUICK = Fit(epochs=1, batch=32, lr=7e-3)
TASK = Dna(
    library=SMALL,
    oracle=FittedOracle(library=SMALL, half=0, members=2, fit=QUICK),
    eval_oracle=FittedOracle(library=SMALL, half=1, members=2, fit=QUICK),
)
SPLITS = ("train", "validation", "test")


def letters(tokens) -> str:
    return "".join(LETTERS[token] for token in tokens)


def consensus(name: str) -> list[int]:
    return motifs()[name].probability.argmax(0).tolist()


def canvas(*placed: tuple[int, list[int]]) -> torch.Tensor:
    """A sequence of T that has no site of its own, with blocks written into it."""
    row = torch.full((LENGTH,), 3)
    for place, block in placed:
        row[place : place + len(block)] = torch.tensor(block)
    return row[None]


def drawn(n: int) -> torch.Tensor:
    """Sequences of the library: sites, pairs and repressors among them."""
    return SMALL.everything().tokens[:n]


# Motifs


def test_the_motifs_are_those_of_the_database():
    """Release, licence and the sha256 of ids and counts as read from JASPAR2024.sqlite."""
    data = json.loads((files("rescore.tasks") / "dna_motifs.json").read_text())
    assert data["release"] == "JASPAR 2024" and data["license"].startswith("CC BY 4.0")
    assert "10.1093/nar/gkad1059" in data["citation"]
    content = [(m["matrix_id"], m["name"], m["counts"]) for m in data["motifs"]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == "e39b44e8b8d0dec7bd2a3105b0216d94a97165a42e06578cff4f037d479690e0"
    assert all(re.fullmatch(r"MA\d{4}\.\d", matrix_id) for matrix_id, _, _ in content)
    assert len(motifs()) == 12 and {*ACTIVATORS, *REPRESSORS} == set(motifs())


def test_a_motif_is_its_frequencies_mixed_with_one_percent_of_uniform():
    """CREB1 begins with T in 61786 of 79544 sites; every column is a law without zeros."""
    law = motifs()["CREB1"].probability
    data = json.loads((files("rescore.tasks") / "dna_motifs.json").read_text())
    counts = next(m["counts"] for m in data["motifs"] if m["name"] == "CREB1")
    total = sum(counts[letter][0] for letter in LETTERS)
    assert law[3, 0] == pytest.approx(0.99 * counts["T"][0] / total + 0.0025)
    for motif in motifs().values():
        assert (motif.probability >= 0.0025).all()
        np.testing.assert_allclose(motif.probability.sum(0), 1)


def by_hand(row: list[int]) -> dict[tuple[str, int, int], float]:
    """Occupancy of every motif, strand and place, with loops over letters."""
    found = {}
    for name, motif in motifs().items():
        law, threshold = motif.probability.tolist(), motif.threshold
        for place in range(LENGTH - motif.width + 1):
            site = row[place : place + motif.width]
            for strand, read in enumerate((site, [3 - letter for letter in reversed(site)])):
                odds = sum(math.log(4 * law[letter][i]) for i, letter in enumerate(read))
                found[name, strand, place] = 1 / (1 + math.exp(threshold - odds))
    return found


def test_occupancy_by_hand():
    """Log-odds of all windows of both strands; a site that would run over the end is none."""
    row = drawn(40)[7]
    bound = occupancy(row[None])[0]
    expected = torch.zeros_like(bound, dtype=torch.float64)
    for (name, strand, place), value in by_hand(row.tolist()).items():
        expected[list(motifs()).index(name), strand, place] = value
    torch.testing.assert_close(bound.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_cut_site_at_the_end_is_not_bound():
    site = consensus("HNF1A")
    for lost in (0, 1):
        bound = occupancy(canvas((LENGTH - len(site) + lost, site[: len(site) - lost])))
        assert bool((site_counts(bound)[0, list(motifs()).index("HNF1A")] > 0.5) == (lost == 0))


def test_known_patterns_score_two_at_the_threshold():
    """Motifs of at most 12 letters: the response to a site is 2 log-odds / threshold."""
    patterns = known_patterns(12)
    for row, (name, motif) in enumerate(motifs().items()):
        if motif.width > 12:
            continue
        left, site = (12 - motif.width) // 2, consensus(name)
        odds = sum(math.log(4 * motif.probability[letter, i]) for i, letter in enumerate(site))
        for strand, read in enumerate((site, reverse_complement(site))):
            response = sum(
                patterns[2 * row + strand, letter, left + i].item() for i, letter in enumerate(read)
            )
            assert response == pytest.approx(2 * odds / motif.threshold)


def test_of_a_wide_motif_the_most_informative_columns_are_kept():
    law = motifs()["REST"].probability
    information = (law * np.log(4 * law)).sum(0)
    best = max(range(law.shape[1] - 11), key=lambda start: information[start : start + 12].sum())
    row = 2 * list(motifs()).index("REST")
    expected = 2 * np.log(4 * law[:, best : best + 12]) / motifs()["REST"].threshold
    np.testing.assert_allclose(known_patterns(12)[row], expected)


# The grammar


def activity_by_hand(row: list[int]) -> float:
    """The formula of ``true_activity``, with loops."""
    bound = by_hand(row)
    width = {name: motif.width for name, motif in motifs().items()}

    def at(name: str, strand: int, place: int) -> float:
        return bound.get((name, strand, place), 0.0)

    count = {
        name: sum(max(at(name, 0, i), at(name, 1, i)) for i in range(LENGTH)) for name in motifs()
    }
    gain = sum(2 * w * (1 - math.exp(-count[name] / 2)) for name, w in ACTIVATORS.items())
    for pair in PAIRS:
        pairs, other = 0.0, 0 if pair.same else 1
        for i, gap in itertools.product(range(LENGTH), range(pair.gap[0], pair.gap[1] + 1)):
            right = at(pair.second, other, i + width[pair.first] + gap)
            pairs += at(pair.first, 0, i) * right
            right = at(pair.first, 1, i + width[pair.second] + gap)
            pairs += at(pair.second, 1 - other, i) * right
        gain += pair.gain * (1 - math.exp(-pairs))
    for name, taken in REPRESSORS.items():
        gain *= 1 - taken * (1 - math.exp(-count[name]))
    return gain


def test_true_activity_by_hand():
    rows = torch.cat([drawn(4), *(pair_at(pair, pair.gap[1], end=True) for pair in PAIRS)])
    expected = torch.tensor([activity_by_hand(row) for row in rows.tolist()])
    torch.testing.assert_close(true_activity(rows), expected, atol=1e-4, rtol=1e-4)


def test_both_strands_count_alike():
    rows = drawn(60)
    other = torch.tensor([reverse_complement(row) for row in rows.tolist()])
    torch.testing.assert_close(true_activity(rows), true_activity(other), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(true_accessibility(rows), true_accessibility(other))


def pair_at(pair, gap: int, *, flip: bool = False, end: bool = False) -> torch.Tensor:
    """The consensus sites of a pair at a distance, the second turned round if asked for."""
    first, second = consensus(pair.first), consensus(pair.second)
    if pair.same == flip:
        second = reverse_complement(second)
    start = LENGTH - len(first) - gap - len(second) if end else 60
    return canvas((start, first), (start + len(first) + gap, second))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.first)
def test_a_pair_works_at_its_distances_only(pair):
    """From the fewest to the most letters between the sites, and not one fewer or more."""
    low, high = pair.gap
    inside = [true_activity(pair_at(pair, gap)).item() for gap in (low, high)]
    outside = [true_activity(pair_at(pair, gap)).item() for gap in (low - 1, high + 1)]
    assert min(inside) > max(outside) + 0.4 * pair.gain


def test_a_pair_works_in_its_direction_only():
    """CEBPB, CREB1 and HNF1A read much the same on both strands; NFYA and FOXA2 do not."""
    for pair in PAIRS[1:]:
        right, wrong = (true_activity(pair_at(pair, 12, flip=flip)) for flip in (False, True))
        assert right > wrong + 0.4 * pair.gain


@pytest.mark.parametrize("name", ["HNF4A", "SP1", "REST", "SNAI2"])
def test_activators_add_and_repressors_take_away(name):
    plain = canvas((20, consensus("ELF1")), (50, consensus("FOS::JUN")))
    changed = plain.clone()
    changed[0, 120 : 120 + motifs()[name].width] = torch.tensor(consensus(name))
    change = true_activity(changed) / true_activity(plain)
    assert change > 1.2 if name in ACTIVATORS else change < 0.8


def test_openers_open():
    closed, opened = canvas(), canvas((20, consensus("FOXA2")), (60, consensus("GATA4")))
    assert true_accessibility(closed) < 0.1 and true_accessibility(opened) > 0.5


# The generator


def test_backgrounds_have_their_composition():
    """Contents spread from 0.35 to 0.65 less what the rarity of C-G takes; strands are alike."""
    rows = background(1000, np.random.default_rng(0))
    content = np.isin(rows, (1, 2)).mean(1)
    assert 0.4 < content.mean() < 0.5 and 0.06 < content.std() < 0.12
    word = dna_metrics.kmer_counts(torch.tensor(rows), 2).reshape(4, 4)
    assert 0.3 < word[1, 2] / word[2, 1] < 0.5
    for a, b in itertools.product(range(4), repeat=2):  # words are as frequent as their partners
        assert word[a, b].item() == pytest.approx(word[3 - b, 3 - a].item(), rel=0.05)


@pytest.mark.parametrize("content", [0.35, 0.6])
def test_letter_laws_are_those_of_the_weights(content):
    """In the middle of all words of 8 letters, weighed one by one, pairs are as in the chain."""
    words = np.array(list(itertools.product(range(4), repeat=8)))
    single = np.array([1 - content, content, content, 1 - content]) / 2
    rare = ((words[:, :-1] == 1) & (words[:, 1:] == 2)).sum(1)
    weight = single[words].prod(1) * 0.25**rare
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (words[:, 3], words[:, 4]), weight / weight.sum())
    first, after = letter_laws(np.array([content]))
    np.testing.assert_allclose(first[0] @ after[0], first[0], rtol=1e-9)
    np.testing.assert_allclose(first[0][:, None] * after[0], pairs, atol=2e-4)


def test_planted_blocks_stand_whole_and_apart():
    rng = np.random.default_rng(4)
    for _ in range(50):
        row = np.full(LENGTH, 3)
        blocks = [[1] * 7, [2] * 30, [0, -1, -1, 0], [1] * 2]
        dna_sequences._plant(row, blocks, rng)
        text = letters(row)
        assert "C" * 7 in text and "G" * 30 in text and "ATTA" in text
        assert [text.count(letter) for letter in "ACG"] == [2, 9, 30]


def test_forbidden_pairs_lie_outside_the_gap():
    rng = np.random.default_rng(5)
    for pair, allowed in itertools.product(PAIRS, (True, False)):
        for _ in range(30):
            gap = dna_sequences._pair(pair, rng, allowed=allowed).count(-1)
            assert (pair.gap[0] <= gap <= pair.gap[1]) == allowed


def test_sites_are_drawn_from_their_motif():
    """Letter frequencies of 2000 sites are the motif's, within 5 standard errors."""
    rng = np.random.default_rng(6)
    sites = np.array([dna_sequences._site("GATA4", rng) for _ in range(2000)])
    law = motifs()["GATA4"].probability
    frequency = np.stack([(sites == letter).mean(0) for letter in range(4)])
    assert (np.abs(frequency - law) <= 5 * np.sqrt(law * (1 - law) / 2000)).all()
    scrambled = np.array([dna_sequences._site("GATA4", rng, scrambled=True) for _ in range(2000)])
    frequency = np.stack([(scrambled == letter).mean(0) for letter in range(4)])
    np.testing.assert_allclose(frequency, law.mean(1, keepdims=True).repeat(8, 1), atol=0.06)


def test_there_are_negatives_and_positives():
    """A good part of the library is as inactive as background, and a good part is far above."""
    activity = true_activity(SMALL.everything().tokens)
    level = true_activity(torch.tensor(background(400, np.random.default_rng(1)))).quantile(0.9)
    assert 0.25 < (activity < level).float().mean() < 0.75


def test_a_library_is_a_pure_function_of_its_fields():
    """The same bits again, others for another seed; the global generators are left alone."""
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # pyright: ignore
    afresh = dna_sequences._measured.__wrapped__
    first, again, other = (afresh(Grammar(sequences=50, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.activity, again.activity)
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # pyright: ignore


def test_measurements_are_the_truth_and_an_error():
    exact = Grammar(sequences=60, noise=0.0).everything()
    torch.testing.assert_close(exact.activity, true_activity(exact.tokens))
    noisy = Grammar(sequences=300, noise=0.7).everything()
    error = noisy.activity - true_activity(noisy.tokens)
    assert error.mean().abs() < 4 * 0.7 / 300**0.5
    assert error.std().item() == pytest.approx(0.7, rel=4 / 600**0.5)
    assert noisy.accessible is not None
    opening = true_accessibility(noisy.tokens)
    assert (noisy.accessible - opening).mean().abs() < 4 * 0.5 / 300**0.5
    assert noisy.accessible[opening > 0.5].mean() > noisy.accessible[opening < 0.5].mean() + 0.3


@pytest.mark.parametrize(
    ("field", "value"), [("sequences", 0), ("noise", -0.1), ("noise", math.nan), ("seed", -1)]
)
def test_a_grammar_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is "):
        Grammar(**{field: value})


# Splits


def test_membership_is_read_off_the_letters():
    """The first 8 bytes of the sha256: last digit the split, parity of the rest the half."""
    for row in drawn(60).tolist():
        number = int.from_bytes(hashlib.sha256(bytes(row)).digest()[:8])
        split = "train" if number % 10 < 8 else "validation" if number % 10 == 8 else "test"
        assert membership(row) == (split, number // 10 % 2)


def test_parts_share_no_sequence_and_leave_none_out():
    """Three splits times two halves: the data of the two oracles, and what they are judged on."""
    parts = [
        {letters(row) for row in SMALL.part(split, half).tokens.tolist()}
        for split in SPLITS
        for half in (0, 1)
    ]
    assert all(parts) and not any(a & b for a, b in itertools.combinations(parts, 2))
    assert sum(map(len, parts)) == len(SMALL.everything().tokens) == 400
    for split in SPLITS:
        whole = {letters(row) for row in SMALL.part(split).tokens.tolist()}
        assert whole == parts[2 * SPLITS.index(split)] | parts[2 * SPLITS.index(split) + 1]


def test_parts_keep_measurements_with_their_sequences():
    whole, part = SMALL.everything(), SMALL.part("test", 1)
    for tokens, activity in zip(part.tokens, part.activity, strict=True):
        assert activity == whole.activity[(whole.tokens == tokens).all(1)][0]


def test_the_oracles_learn_from_disjoint_data(monkeypatch):
    """What each fit is given: training data without overlap, judged on test data of neither."""
    seen = []
    plain = dna.fit
    monkeypatch.setattr(dna, "fit", lambda *a: seen.append(a[1:3]) or plain(*a))
    dna._fitted.cache_clear()
    for oracle in Dna(library=SMALL).oracles:
        assert isinstance(oracle, FittedOracle)
        _ = FittedOracle(library=SMALL, half=oracle.half, members=1, fit=QUICK).held_out
    sets = [{letters(row) for row in part.inputs.tolist()} for pair in seen for part in pair]
    assert len(sets) == 4 and len(sets[0]) > 100 and len(sets[2]) > 100
    assert not sets[0] & sets[2] and not (sets[0] | sets[2]) & (sets[1] | sets[3])


def test_an_empty_part_is_refused():
    with pytest.raises(ValueError, match=r"none of 1 sequences belongs to split 'test', half 1"):
        Grammar(sequences=1, seed=1).part("test", 1)


# Oracles


def test_equal_fields_give_the_same_oracle():
    tokens = SMALL.part("test").tokens
    oracle, other = TASK.oracles
    first = oracle(tokens)
    dna._fitted.cache_clear()
    dna._on.cache_clear()
    assert torch.equal(oracle(tokens), first) and first.shape == (len(tokens),)
    assert not torch.equal(other(tokens), first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_oracle_is_fitted_where_gradients_are_off(mode):
    """Rewards are scored without gradients; the fit behind the first score needs them."""
    fresh = Grammar(sequences=80, seed=len(mode.__name__))
    oracle = FittedOracle(library=fresh, half=0, members=1, fit=QUICK)
    dna_sequences._filters.cache_clear()
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    with mode():
        inside = oracle(tokens)
    outside = oracle(tokens)
    assert torch.equal(inside, outside) and not outside.requires_grad
    assert not any(part.is_inference() for part in dna_sequences._filters())


def test_the_fit_finds_signal():
    """A single epoch on 160 sequences explains some of the held-out variance."""
    oracle = FittedOracle(library=SMALL, half=0, members=1, fit=Fit(epochs=8, batch=16, lr=7e-3))
    assert 0.2 < oracle.held_out < 0.95


def test_a_mask_is_refused_by_name():
    tokens = SMALL.part("test").tokens[:3].clone()
    tokens[1, 9] = 4
    for oracle in (*TASK.oracles, TASK.classifier):
        with pytest.raises(ValueError, match="token 4 at position 9 of sequence 1"):
            oracle(tokens)
    with pytest.raises(RewardError, match="'activity' raised ValueError: token 4 at position 9"):
        TASK.reward.terms(tokens, TASK.prompts("test", torch.arange(3)))


def test_one_oracle_for_both_jobs_is_warned_of():
    """The same object or an equal one; two on disjoint data, or of the user, pass in silence."""
    own = lambda tokens: (tokens == 2).float().mean(1)  # noqa: E731
    half = FittedOracle(library=SMALL, half=1, seed=1)
    same = FittedOracle(library=SMALL, half=1, seed=1)
    for oracles in ((own, own), (half, half), (half, same), (same, None)):
        with pytest.warns(UserWarning, match="same oracle: eval_activity is then the reward"):
            Dna(library=SMALL, oracle=oracles[0], eval_oracle=oracles[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dna(library=SMALL)
        Dna(library=SMALL, oracle=own)
        Dna(library=SMALL, eval_oracle=own)


# The task


def test_the_reward_is_cheap_until_something_is_scored():
    """Names and weights are known, and a run can be checked, without a fit."""
    before = dna._fitted.cache_info().misses, dna_sequences._measured.cache_info().misses
    task = Dna(library=Grammar(sequences=123, seed=77))
    task.check()
    assert list(task.reward.functions) == [
        "activity",
        "eval_activity",
        "accessible",
        "true_activity",
    ]
    assert before == (dna._fitted.cache_info().misses, dna_sequences._measured.cache_info().misses)


def test_terms_are_what_they_say():
    tokens = SMALL.part("test").tokens
    prompts = TASK._as_prompts(tokens)
    terms = TASK.reward.terms(tokens, prompts)
    torch.testing.assert_close(terms["activity"], TASK.oracles[0](tokens))
    torch.testing.assert_close(terms["eval_activity"], TASK.oracles[1](tokens))
    torch.testing.assert_close(terms["true_activity"], true_activity(tokens))
    assert torch.equal(terms["accessible"], (TASK.classifier(tokens) > 0.5).float())
    torch.testing.assert_close(TASK.reward.total(terms), terms["activity"])


def test_a_classifier_gives_probabilities_that_follow_the_labels():
    fit = Fit(loss="logistic", epochs=8, batch=8, lr=7e-3)
    classifier = dna.FittedClassifier(library=SMALL, half=1, fit=fit)
    probability, labels = classifier(drawn(400)), SMALL.everything().accessible
    assert labels is not None and bool(((probability > 0) & (probability < 1)).all())
    assert probability[labels == 1].mean() > probability[labels == 0].mean() + 0.1
    test = SMALL.part("test")
    right = (classifier(test.tokens) > 0.5) == (test.accessible == 1)
    assert classifier.held_out == pytest.approx(right.float().mean().item())


def test_oracles_of_the_user_are_used():
    task = Dna(
        library=SMALL,
        oracle=lambda tokens: (tokens == 2).float().sum(1),
        eval_oracle=lambda tokens: (tokens == 1).float().sum(1),
        reward_weights={"activity": 0.5, "eval_activity": 2.0},
    )
    tokens = torch.tensor([[2] * 50 + [1] * 30 + [0] * 120])
    terms = task.reward.terms(tokens, task._as_prompts(tokens))
    assert (terms["activity"], terms["eval_activity"]) == (50, 30)
    assert task.reward.total(terms) == 85


def test_prompts_are_empty_canvases():
    prompts = TASK.prompts("validation", torch.tensor([5, 200, 255]))
    assert (prompts.tokens == 4).all() and prompts.editable.all() and not prompts.info
    assert prompts.tokens.shape == (3, 200)
    assert prompts.group.tolist() == prompts.sample_id.tolist() == [0, 1, 2]
    assert [TASK.size(split) for split in SPLITS] == [8192, 256, 640]
    for number in (-1, 256):
        with pytest.raises(ValueError, match=f"prompt {number} of split 'validation' does not"):
            TASK.prompts("validation", torch.tensor([0, number]))


def test_clean_sequences_are_those_of_the_split():
    for split in SPLITS:
        clean = TASK.clean(split)
        assert torch.equal(clean.x_0, SMALL.part(split).tokens) and clean.editable.all()
        assert all(membership(row)[0] == split for row in clean.x_0.tolist())


def test_reading_undoes_showing():
    tokens = torch.where(torch.arange(200) % 3 == 0, 4, SMALL.everything().tokens[0])
    prompts = TASK.read([TASK.show(tokens), "." * 200])
    assert torch.equal(prompts.tokens[0], tokens) and (prompts.tokens[1] == 4).all()
    assert torch.equal(prompts.editable, prompts.tokens == 4)
    assert TASK.show(torch.tensor([0, 1, 2, 3, 4])) == "ACGT."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("." * 199 + "N", "characters ['N']"),
        ("." * 199, "has 199 letters, 199 of them dots"),
        ("A" * 200, "0 of them dots; expected 200 with at least one dot"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TASK.read([text])


def test_bad_fields_are_refused():
    for field in ("pool", "validation_pool", "test_pool"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            dataclasses.replace(TASK, **{field: 0})
    with pytest.raises(ValueError, match=r"unknown terms \['binding'\]"):
        Dna(library=SMALL, reward_weights={"binding": 1.0})
    with pytest.raises(ValueError, match="no sequence"):
        TASK.read([])


def test_there_is_no_perfect_output_and_validation_scores_real_ones():
    assert TASK.gold(TASK.prompts("test", torch.arange(2))) is None
    TASK.validate()
    broken = Dna(library=SMALL, oracle=lambda tokens: torch.full((len(tokens),), math.nan))
    with pytest.raises(RewardError, match="'activity' returned nan"):
        broken.validate()


# Metrics


def test_words_are_counted():
    """Against a counter of strings."""
    rows = drawn(20)
    counted = collections.Counter(
        letters(row)[i : i + 3] for row in rows.tolist() for i in range(LENGTH - 2)
    )
    words = ["".join(word) for word in itertools.product(LETTERS, repeat=3)]
    assert dna_metrics.kmer_counts(rows).tolist() == [counted[word] for word in words]


def test_word_correlation_is_pearsons():
    a, b = drawn(20), drawn(45)[20:]
    expected = np.corrcoef(dna_metrics.kmer_counts(a), dna_metrics.kmer_counts(b))[0, 1]
    assert dna_metrics.kmer_correlation(a, b) == pytest.approx(expected)
    assert dna_metrics.kmer_correlation(a, a) == pytest.approx(1.0)


def test_motifs_are_counted_by_place():
    """Two sites of CREB1, one on each strand; a palindrome at one place counts once."""
    site = consensus("CREB1")
    rows = canvas((20, site), (100, reverse_complement(site)))
    count = dict(zip(motifs(), dna_metrics.motif_counts(rows).tolist(), strict=True))
    bound = by_hand(rows[0].tolist())
    expected = sum(
        max(bound["CREB1", strand, place] for strand in (0, 1)) > 0.5
        for place in range(LENGTH - len(site) + 1)
    )
    assert count["CREB1"] == expected >= 2 and count["HNF4A"] == 0


def test_ranks_share_ties():
    x = torch.tensor([3.0, 1.0, 3.0, 0.0, 3.0]).double()
    assert dna_metrics.ranks(x).tolist() == [3.0, 1.0, 3.0, 0.0, 3.0]
    assert dna_metrics.ranks(torch.tensor([5.0, 5.0, 7.0]).double()).tolist() == [0.5, 0.5, 2.0]


def test_motif_correlation_is_spearmans():
    a, b = drawn(60), drawn(120)[60:]
    x, y = (dna_metrics.motif_counts(rows).numpy() for rows in (a, b))
    rank = lambda v: [np.mean(np.flatnonzero(np.sort(v) == each)) for each in v]  # noqa: E731
    expected = np.corrcoef(rank(x), rank(y))[0, 1]
    assert dna_metrics.motif_correlation(a, b) == pytest.approx(expected)


def test_a_correlation_of_constants_is_refused():
    with pytest.raises(ValueError, match="all counts are equal"):
        dna_metrics.motif_correlation(canvas(), drawn(20))


def test_diversity_is_the_mean_distance_of_pairs():
    rows = drawn(12)
    pairs = [(a != b).double().mean().item() for a, b in itertools.combinations(rows, 2)]
    assert dna_metrics.diversity(rows) == pytest.approx(sum(pairs) / len(pairs))
    assert dna_metrics.diversity(rows[:1].repeat(3, 1)) == 0
    assert dna_metrics.distinct(torch.cat([rows[:3], rows[:1]])) == 0.75
    with pytest.raises(ValueError, match="at least 2"):
        dna_metrics.diversity(rows[:1])


def test_the_likelihood_bound_of_a_uniform_model_is_exact():
    """Every masked letter costs log V, so any masks give -L log V."""
    model = TableDenoiser(2, 3, generator=torch.Generator(), scale=0.0)
    rows = torch.tensor([[0, 1, 1], [1, 1, 0]])
    generator = torch.Generator().manual_seed(0)
    bound = dna_metrics.log_likelihood_bound(model, rows, draws=5, generator=generator)
    torch.testing.assert_close(bound, torch.full((2,), -3 * math.log(2)).double())


def test_the_likelihood_bound_is_estimated_without_bias():
    """Against the sum over all masks: mean over m of the mean over the sets of m masks."""
    model = TableDenoiser(2, 3, generator=torch.Generator().manual_seed(1))
    row = torch.tensor([0, 1, 1])
    exact = 0.0
    for m in (1, 2, 3):
        sets = list(itertools.combinations(range(3), m))
        for places in sets:
            x_t = row.clone()
            x_t[list(places)] = 2
            law = model.predict(x_t[None])[0].log_softmax(-1)
            exact += sum(law[i, row[i]].item() for i in places) * 3 / m / len(sets) / 3
    generator = torch.Generator().manual_seed(2)
    rows = row.repeat(4000, 1)
    values = dna_metrics.log_likelihood_bound(model, rows, draws=2, generator=generator)
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / 4000**0.5
    assert values.std().item() < 0.9


def test_metrics_leave_the_training_oracle_out():
    """Medians of the evaluation oracle and the truth, correlations with the most active tests."""

    def never(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the training oracle was asked")

    task = Dna(library=SMALL, oracle=never, eval_oracle=TASK.eval_oracle)
    rows = SMALL.part("validation").tokens
    found = task.metrics(rows)
    assert found["median_activity"] == TASK.oracles[1](rows).median()
    assert found["median_true_activity"] == true_activity(rows).median()
    assert found["accessible"] == pytest.approx((TASK.classifier(rows) > 0.5).float().mean().item())
    assert found["diversity"] == dna_metrics.diversity(rows) and found["distinct"] == 1
    assert found["kmer_correlation"] == dna_metrics.kmer_correlation(rows, task.reference())
    assert found["motif_correlation"] == dna_metrics.motif_correlation(rows, task.reference())


def test_the_reference_is_the_most_active_of_the_test_split(monkeypatch):
    monkeypatch.setattr(dna, "REFERENCE", 5)
    test = SMALL.part("test")
    expected = sorted(range(len(test.tokens)), key=lambda row: -test.activity[row])[:5]
    assert torch.equal(TASK.reference(), test.tokens[expected])


# The default task at full size


@pytest.mark.slow
def test_the_default_oracles_are_good_but_not_perfect():
    """The figures of ``Dna``: R2 between 0.6 and 0.95, so that over-optimisation can be seen."""
    task = Dna()
    scores = [oracle.held_out for oracle in task.oracles if isinstance(oracle, FittedOracle)]
    assert scores == pytest.approx([0.74, 0.74], abs=0.02)
    assert all(0.6 < score < 0.95 for score in scores)
    assert task.classifier.held_out == pytest.approx(0.74, abs=0.02)
    test = task.library.part("test")
    left = (test.activity - true_activity(test.tokens)).square().mean() / test.activity.var()
    assert 1 - left.item() == pytest.approx(0.86, abs=0.01)


@pytest.mark.slow
def test_climbing_one_oracle_pleases_it_more_than_the_other_and_the_truth():
    """60 steps of the best of 24 changes of 4 letters each, from backgrounds."""
    task = Dna()
    trained, judging = task.oracles
    generator = torch.Generator().manual_seed(0)
    rows = start = torch.tensor(background(64, np.random.default_rng(3)))
    for _ in range(60):
        tried = rows[:, None].repeat(1, 24, 1)
        place = torch.randint(LENGTH, (64, 24, 4), generator=generator)
        tried.scatter_(2, place, torch.randint(4, (64, 24, 4), generator=generator))
        tried[:, 0] = rows
        value = trained(tried.flatten(0, 1)).unflatten(0, (64, 24))
        rows = tried[torch.arange(64), value.argmax(1)]
    gains = [
        (function(rows).median() - function(start).median()).item()
        for function in (trained, judging, true_activity)
    ]
    assert gains[0] > gains[1] + 0.5 > gains[2] + 1.0 > 4
