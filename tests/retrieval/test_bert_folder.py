"""A folder with a text encoder: a BERT with all of its weights, or nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, BertTokenizer, PreTrainedModel, RobertaConfig, RobertaModel

from retrieval.models import bert

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """As under the commands: what transformers logs is not seen."""
    logging.getLogger("transformers").setLevel(logging.ERROR)


def write(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def test_bert_base_uncased_as_it_is_published(tmp_path: Path) -> None:
    """With heads, a pooler, a buffer of positions, and the names that TensorFlow gave layer norms."""
    torch.manual_seed(0)
    theirs = BertForPreTraining(BertConfig(vocab_size=len(WORDS), **SIZES)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    file = write(tmp_path, theirs) / "model.safetensors"
    old = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    state["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)
    assert any(key.endswith(".gamma") for key in state)
    save_file(state, file, metadata={"format": "pt"})
    encoder, tokenizer = bert(str(tmp_path), tmp_path)
    ids = torch.tensor([tokenizer("dog dog")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state, theirs.bert(ids).last_hidden_state)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, RobertaModel(RobertaConfig(vocab_size=len(WORDS), **SIZES)))
    with pytest.raises(ValueError, match=r"is a model of type 'roberta' .*expected 'bert'.*bert-base-uncased"):
        bert(str(tmp_path), tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write(tmp_path, BertForPreTraining(BertConfig(vocab_size=len(WORDS), **SIZES)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 weights of the BERT .*encoder\.layer\.2\..* stay random"):
        bert(str(tmp_path), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors"):
        bert(str(tmp_path), tmp_path)


def test_damaged_weights_and_those_of_another_size_are_told(tmp_path: Path) -> None:
    write(tmp_path, BertForPreTraining(BertConfig(vocab_size=len(WORDS), **SIZES)))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be loaded as the BERT .*damaged, get it"):
            bert(str(tmp_path), tmp_path)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ValueError, match=r"cannot be loaded as the BERT .*take both files from the same model"):
        bert(str(tmp_path), tmp_path)
