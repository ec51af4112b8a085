"""Conversations in a tree learn what they would learn in rows of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.handwriting.conversations import chat, plain, two_pictures
from examples.handwriting.digits import TRAIN_FORMS, digits_of
from examples.handwriting.model import NUM_QUERIES, make_model, make_processor
from examples.handwriting.scenes import make_scenes
from examples.handwriting.training import in_order, texts_of_all_tasks, trees, without_picture
from examples.handwriting.trees import TreeCollator
from processing.collators import PaddedCollator
from processing.special_tokens import GROUNDING_TOKENS, IMG_END
from processing.supervision import Supervision
from trainers.loss import supervised_loss

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(digits_of(TRAIN_FORMS), 11, seed=3)


@pytest.fixture(scope="module")
def processor(scenes):
    return make_processor(texts_of_all_tasks(scenes))


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return make_model(processor).train()


@pytest.fixture
def collate(processor):
    return TreeCollator(processor.tokenizer.convert_tokens_to_ids(IMG_END), processor.tokenizer.pad_token_id)


def encoded(processor, tree, **settings):
    return list(Supervision(processor, **settings).stream(tree))


def made(kind, scenes, processor):
    """Two trees of different size, so that one is padded."""
    if kind == "plain":
        made = [
            [plain(scenes[0], RNG, name) for name in ("caption", "grounding", "reading")],
            [plain(scenes[1], RNG, name) for name in ("referring", "ocr")],
        ]
    elif kind == "chat":
        made = [
            [chat(scenes[2], RNG, ["caption", "grounding", "ocr"]), chat(scenes[2], RNG, ["seeing"])],
            [two_pictures(scenes[3], scenes[4], RNG, turns=2) for _ in range(2)],
        ]
    else:
        made = [
            [without_picture(plain(scenes[5], RNG, name), processor) for name in ("caption", "grounding", "ocr")],
            [without_picture(plain(scenes[6], RNG, "reading"), processor)],
        ]
    in_text = GROUNDING_TOKENS if kind == "text" else ()
    return [encoded(processor, tree, special_in_text=in_text) for tree in made]


@pytest.mark.parametrize("kind", ["plain", "chat", "text"])
def test_a_tree_has_the_loss_and_the_gradients_of_its_conversations_in_rows_of_their_own(
    kind, model, processor, scenes, collate
):
    both = made(kind, scenes, processor)
    alone = PaddedCollator(processor.tokenizer.pad_token_id)([example for tree in both for example in tree])
    losses, gradients = [], []
    for batch in (alone, collate(both)):
        model.zero_grad()
        loss, _ = supervised_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_tree_holds_its_picture_once(processor, scenes, collate):
    tree = encoded(processor, [plain(scenes[0], RNG, name) for name in ("caption", "grounding", "reading")])
    batch = collate([tree])
    assert len(batch["pixel_values"]) == 1
    assert (batch["input_ids"] == processor.image_token_id).sum() == NUM_QUERIES
    assert (
        collate.num_tokens(tree)
        == batch["input_ids"].shape[1]
        == sum(e.length for e in tree) - 2 * collate.trunk(tree)
    )


def test_conversations_about_different_numbers_of_pictures_are_refused(processor, scenes, collate):
    tree = encoded(processor, [two_pictures(scenes[0], scenes[1], RNG), chat(scenes[0], RNG, ["reading"])])
    with pytest.raises(ValueError, match="Conversations 0 and 1 of a tree differ in the first"):
        collate([tree])


def test_a_conversation_supervised_right_behind_the_trunk_is_refused(processor, scenes, collate):
    """What stands before that token in the row is the end of its neighbour, not the trunk."""
    tree = encoded(processor, [plain(scenes[0], RNG, name) for name in ("caption", "reading")])
    place = collate.trunk(tree)
    labels = tree[1].labels.clone()
    labels[place] = tree[1].input_ids[place]
    with pytest.raises(ValueError, match="Conversation 1 of a tree is supervised from its first token on"):
        collate([[tree[0], replace(tree[1], labels=labels)]])


def test_conversations_of_a_tree_are_about_the_same_picture_and_of_tasks_drawn_by_their_shares(scenes):
    drawn = list(trees(scenes, {"reading": 3.0, "caption": 1.0}, count=101, branches=3, seed=0))
    tasks = [example.task for tree in drawn for example in tree]
    assert {len(tree) for tree in drawn} == {3}
    for number, tree in enumerate(drawn):
        assert all(example.pictures[0].tobytes() == scenes[number % 11].picture.tobytes() for example in tree)
    assert tasks.count("ocr_vqa") / len(tasks) == pytest.approx(0.75, abs=0.1)


def test_two_thirds_of_the_conversations_have_one_turn_and_the_others_two_or_three(scenes):
    drawn = list(trees(scenes, {"conversation": 3.0, "two pictures": 1.0}, count=101, branches=5, seed=0))
    pictures = [{example.num_pictures for example in tree} for tree in drawn]
    assert all(len(of_tree) == 1 for of_tree in pictures)
    assert 0.15 < pictures.count({2}) / 101 < 0.35
    turns = [len(example.messages) // 2 for tree in drawn for example in tree]
    assert set(turns) == {1, 2, 3}
    assert turns.count(1) / 505 == pytest.approx(2 / 3, abs=0.07)
    assert turns.count(2) / 505 == pytest.approx(1 / 6, abs=0.05)


def test_turns_are_drawn_by_the_shares_of_what_is_asked(scenes):
    shares = {"caption": 0.0, "reading": 1.0, "seeing": 0.0, "grounding": 3.0, "referring": 0.0, "ocr": 0.0}
    drawn = list(trees(scenes, {"conversation": 1.0}, count=101, branches=5, seed=0, asked=shares))
    boxes = [
        part["type"] == "box"
        for tree in drawn
        for example in tree
        for message in example.messages[1::2]
        for part in message["content"]
    ]
    assert len(boxes) > 505
    assert sum(boxes) / len(boxes) == pytest.approx(0.75, abs=0.05)


def test_every_tree_is_learned_from_once_before_any_comes_again():
    order = in_order(list("abcdefg"), 17, seed=0)
    assert sorted(order[:7]) == sorted(order[7:14]) == list("abcdefg")
    assert len(order) == 17
    assert order[:7] != order[7:14]
