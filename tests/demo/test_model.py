"""The demonstration's untrained model."""

import pytest
import torch

from examples.handwriting.conversations import caption_of
from examples.handwriting.digits import TRAIN_FORMS, digits_of
from examples.handwriting.model import LOOKS_BACK, make_model, make_processor
from examples.handwriting.scenes import make_scenes


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    scenes = make_scenes(digits_of(TRAIN_FORMS), 20, seed=0)
    return make_model(make_processor(map(caption_of, scenes)))


def test_each_head_of_the_first_layer_looks_at_the_token_so_many_places_back(model):
    T = 37
    model.set_attn_implementation("eager")
    ids_BT = torch.randint(0, 50, (11, T), generator=torch.Generator().manual_seed(1))
    first, *others = model(input_ids=ids_BT, output_attentions=True).attentions
    distance_TT = torch.arange(T)[:, None] - torch.arange(T)

    def attention_by_distance(layer_BKTT, head):
        late = torch.arange(T)[:, None] >= 6
        return torch.stack([layer_BKTT[:, head, (distance_TT == distance) & late].mean() for distance in range(7)])

    for head, offset in enumerate(LOOKS_BACK):
        by_distance = attention_by_distance(first, head)
        assert by_distance.argmax() == offset
        assert by_distance[offset] > 0.4
        assert all(attention_by_distance(layer, head).max() < 0.1 for layer in others)
