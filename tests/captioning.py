"""Small captioners and text encoders of the real classes, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    DebertaConfig,
    DebertaModel,
)


def bert_tokenizer() -> BertTokenizer:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["a", "the", "is", "above", "below", "blue", "green", "red", "circle", "square", ","]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*marks, *words])})


def wild(model: torch.nn.Module) -> None:
    """Weights so large that the output depends on the input."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # A decoder that looks at the picture more than at what it has said.
            torch.nn.init.normal_(parameter, std=3 if "crossattention" in name else 0.5)


def save_captioning(place: Path) -> None:
    """`blip`, a captioner; `bert` and `deberta`, encoders of three layers; in a folder."""
    torch.manual_seed(0)
    words = bert_tokenizer()
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    # As in the released captioners the first token is beyond the tokenizer's vocabulary.
    text = {"vocab_size": len(words) + 2, "bos_token_id": len(words), "num_hidden_layers": 1}
    text |= {"sep_token_id": words.sep_token_id, "max_position_embeddings": 24}
    vision = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, **sizes}
    config = BlipConfig(text_config={**text, **sizes}, vision_config=vision)
    blip = BlipForConditionalGeneration(config)
    wild(blip)
    blip.save_pretrained(place / "blip")
    BlipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "blip")
    bert = BertModel(BertConfig(vocab_size=len(words), num_hidden_layers=3, **sizes))
    wild(bert)
    bert.save_pretrained(place / "bert")
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    deberta = DebertaModel(
        DebertaConfig(vocab_size=len(words), num_hidden_layers=3, **sizes, **relative)
    )
    wild(deberta)
    deberta.save_pretrained(place / "deberta")
    for name in ("blip", "bert", "deberta"):
        words.save_pretrained(place / name)
