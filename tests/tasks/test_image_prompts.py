"""Prompts of images: splits, numbers, and judges that are told the texts."""

from typing import get_args

import pytest
import torch

from rescore.rewards import images as image_rewards
from rescore.rewards.images import brightness
from rescore.tasks.image_prompts import ImagePrompts
from rescore.tasks.task import Split

WORDS = tuple(f"a drawing of {i} apples" for i in range(40))
_SPLIT = ImagePrompts(source=WORDS)
ALL_TRAIN = tuple(_SPLIT.texts_of(_SPLIT.prompts("train", torch.arange(10))))
"""Ten prompts of one split."""


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
    task = ImagePrompts(source=ALL_TRAIN[:n])
    task.check()
    for split in get_args(Split):
        prompts = task.prompts(split, torch.arange(task.size(split)))
        assert task.texts_of(prompts) == list(ALL_TRAIN[:n])


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


def test_black_batches_are_warned_of(monkeypatch):
    monkeypatch.setattr(image_rewards, "_warned", image_rewards.threading.Event())
    task = ImagePrompts(source=WORDS)
    with pytest.warns(UserWarning, match="100% of 2 images are black"):
        task.reward.terms(torch.zeros(2, 3, 8, 8), task.read(["a", "b"]))


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
    with pytest.raises(ValueError, match="more records"):
        ImagePrompts(source=ALL_TRAIN).check()
    with pytest.raises(ValueError, match="start from a PretrainedPipeline"):
        ImagePrompts(source=WORDS).clean("train")
