"""Prompts of images: splits, numbers, and judges that are told the texts."""

import warnings
from typing import get_args

import pytest
import torch

from rescore.rewards.images import brightness, jpeg_size
from rescore.tasks.image_prompts import ImagePrompts
from rescore.tasks.records import place
from rescore.tasks.task import Split

WORDS = tuple(f"a drawing of {i} apples" for i in range(40))
LETTERS = sorted((f"{a}{b}" for a in "abcdefghijklmnop" for b in "qrstuvwxyz"), key=place)
"""Prompts in the order in which the cuts go through them."""


def texts(task, split):
    return task.texts_of(task.prompts(split, torch.arange(task.size(split))))


def test_splits_are_by_content_and_share_none(tmp_path):
    """A file and a list are the same; repeats, spaces and empty lines do not count; adding prompts
    moves none."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*WORDS, "", f"  {WORDS[0]} ", "ein Bär im Schnee"]), "utf-8")
    listed, filed = ImagePrompts(source=WORDS), ImagePrompts(source=str(file))
    assert filed.texts == (*WORDS, "ein Bär im Schnee") and filed.n_labels == 41
    seen = []
    for split in ("train", "validation", "test"):
        texts = [
            task.texts_of(task.prompts(split, torch.arange(task.size(split))))
            for task in (listed, filed)
        ]
        assert set(texts[0]) <= set(texts[1])
        seen += texts[0]
    assert sorted(seen) == sorted(WORDS)
    assert listed.size("train") > listed.size("test") > 0


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_few_prompts_are_in_every_split(n):
    task = ImagePrompts(source=WORDS[:n])
    task.check()
    for split in get_args(Split):
        assert texts(task, split) == list(WORDS[:n])


@pytest.mark.parametrize(
    ("fell", "sizes"),
    [
        ((12, 3, 2), (12, 3, 2)),
        ((1, 4, 5), (1, 4, 5)),
        ((10, 0, 0), (8, 1, 1)),
        ((10, 0, 1), (9, 1, 1)),
        ((10, 1, 0), (9, 1, 1)),
        ((9, 2, 0), (9, 1, 1)),
        ((9, 0, 2), (8, 1, 2)),
        ((0, 5, 5), (1, 4, 5)),
        ((0, 0, 10), (1, 1, 8)),
        ((0, 10, 0), (1, 8, 1)),
    ],
)
def test_ten_prompts_are_enough_for_every_split(fell, sizes):
    """So many fell to each by their hashes; one prompt moves up for each split that was empty."""
    bounds = ((0, 0.8), (0.8, 0.9), (0.9, 1))
    parts = [[text for text in LETTERS if low <= place(text) < high] for low, high in bounds]
    order = [text for part, n in zip(parts, fell, strict=True) for text in part[:n]]
    task = ImagePrompts(source=tuple(sorted(order)))
    task.check()
    found = [texts(task, split) for split in get_args(Split)]
    assert [len(part) for part in found] == list(sizes)
    assert [text for part in found for text in sorted(part, key=place)] == order
    assert all(part == sorted(part) for part in found)


def test_prompts_that_differ_in_case_and_spacing_stay_together():
    """Ten ways to write a prompt are one prompt, too few to split."""
    alike = tuple("a red cat"[:i].upper() + "a red cat"[i:] for i in range(10) if i not in (2, 6))
    assert len(set(alike)) > 6
    rest = WORDS[:5]
    task = ImagePrompts(source=(*alike, *rest))
    assert task.size("test") == task.n_labels == len({*alike, *rest})
    task = ImagePrompts(source=(*alike, *WORDS))
    homes = [split for split in get_args(Split) if {*alike} & {*texts(task, split)}]
    assert len(homes) == 1


def test_a_prompt_is_its_number_for_the_network_and_for_rewards():
    task = ImagePrompts(source=WORDS)
    index = torch.tensor([3, 0, 3])
    prompts = task.prompts("test", torch.tensor([1, 0, 1]))
    assert torch.equal(prompts.inputs["prompt"], prompts.info["prompt"])
    assert prompts.inputs["prompt"].shape == index.shape
    assert task.texts_of(prompts)[0] == task.texts_of(prompts)[2] == task.show_prompt(prompts, 0)
    with pytest.raises(ValueError, match="prompt 99 of split 'test' does not exist"):
        task.prompts("test", torch.tensor([0, 99]))


def test_typed_prompts_may_be_new():
    """Known ones keep their number, new ones come after all others, each once."""
    task = ImagePrompts(source=WORDS)
    prompts = task.read([WORDS[5], "a pear", " a plum ", "a pear"])
    assert prompts.inputs["prompt"].tolist() == [5, 40, 41, 40]
    assert task.texts_of(prompts) == [WORDS[5], "a pear", "a plum", "a pear"]
    assert task.read(["a plum"]).inputs["prompt"].tolist() == [41] and task.n_labels == 40
    for wrong in ([], ["a", "  "]):
        with pytest.raises(ValueError, match="at least one, none empty"):
            task.read(wrong)


def test_judges_are_told_the_text_of_every_image():
    told = []

    def longest(images, texts):
        told.append(list(texts))
        return [len(text) for text in texts]

    task = ImagePrompts(
        source=WORDS, judges={"length": longest, "light": brightness}, weights={"light": -2.0}
    )
    prompts = task.read(["bb", "a"])
    images = torch.full((2, 3, 4, 4), 0.25)
    terms = task.reward.terms(images, prompts)
    assert told == [["bb", "a"]] and terms["length"].tolist() == [2, 1]
    assert task.reward.total(terms).tolist() == [1.5, 0.5]
    assert torch.equal(task.pictures(images), images)


def test_black_batches_are_warned_of_once_in_a_run():
    """Whatever the number of judges and batches; another run is warned again."""
    for _ in range(2):
        task = ImagePrompts(source=WORDS, judges={"light": brightness, "kb": jpeg_size})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                task.reward.terms(torch.zeros(2, 3, 8, 8), task.read(["a", "b"]))
        assert [str(w.message)[:28] for w in caught] == ["100% of 2 images are black: "]


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="three positive sizes"):
        ImagePrompts(source=WORDS, latents=(4, 0, 8))
    with pytest.raises(ValueError, match="unknown terms"):
        ImagePrompts(source=WORDS, weights={"beauty": 1.0})
    with pytest.raises(ValueError, match="judges is empty"):
        ImagePrompts(source=WORDS, judges={})
    with pytest.raises(ValueError, match="there is no file"):
        ImagePrompts(source=str(tmp_path / "none.txt")).check()
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="there are no prompts"):
        ImagePrompts(source=str(tmp_path / "empty.txt")).check()
    with pytest.raises(ValueError, match="start from a PretrainedPipeline"):
        ImagePrompts(source=WORDS).clean("train")
