"""A refusal classifier: a ModernBERT encoder with one logit for refusals and one for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from safesteer_lite.errors import ModelError
from safesteer_lite.foreign import forbid_hub_kernels
from safesteer_lite.method.memory import fitting
from safesteer_lite.models.plain import ATTENTION, check_loaded, library_config, loading
from safesteer_lite.sources.classifier import check_classifier

_BATCH = 16


class RefusalClassifier:
    """A loaded classifier.

    Args:
        network: a sequence classifier with two labels, in evaluation mode.
        tokenizer: its tokenizer.
        refusal: the number of the label that means a refusal.
    """

    def __init__(self, network: Any, tokenizer: Any, refusal: int) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._refusal = refusal
        self._longest = int(network.config.max_position_embeddings)

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str], done: Callable[[int], None]) -> list[float]:
        """The probability, 0 to 1, that each text holds a refusal; what is longer than the encoder reads is cut at its end.

        Args:
            texts: conversations, written as the classifier was trained to read them.
            done: called with the number of texts so far.
        """
        # Texts of like length share a batch, so that little is computed for padding.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))

        def classify(size: int) -> list[float]:
            found = [0.0] * len(texts)
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = self._tokenizer(
                    [texts[place] for place in places],
                    return_tensors="pt",
                    padding=True,
                    truncation=True,
                    max_length=self._longest,
                ).to(self._network.device)
                logits = self._network(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
                for place, share in zip(places, logits.softmax(-1)[:, self._refusal].tolist(), strict=True):
                    found[place] = share
                done(start + len(places))
            return found

        return fitting(_BATCH, classify)[0]


def load_classifier(folder: Path, device: str) -> RefusalClassifier:
    """Load a refusal classifier in float32.

    Args:
        folder: where it lies.
        device: `cpu` or a card, as `cuda:0`.

    Raises:
        ModelError: it cannot be loaded, or its labels are not a refusal and its opposite.
    """
    forbid_hub_kernels()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = check_classifier(folder)
    refusal = _refusal_label(folder, config)
    settings = library_config(folder, config)
    with loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=settings, local_files_only=True, trust_remote_code=False
        )
    with loading(folder, "model"):
        network, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION,
            dtype=torch.float32,
            device_map={"": device},
            output_loading_info=True,
        )
        check_loaded(folder, info)
    return RefusalClassifier(network.requires_grad_(False).eval(), tokenizer, refusal)


def _refusal_label(folder: Path, config: Mapping[str, Any]) -> int:
    """The number of the label that means a refusal."""
    labels = config.get("id2label")
    named = {str(label).lower(): str(number) for number, label in labels.items()} if isinstance(labels, dict) else {}
    if named.keys() != {"refusal", "non-refusal"} or set(named.values()) != {"0", "1"}:
        raise ModelError(
            f"{folder} does not say which of its labels means a refusal: its labels are {', '.join(named) or 'not named'}.",
            "Its config.json needs an id2label with Refusal and Non-refusal.",
        )
    return int(named["refusal"])
