"""Train the byte-level BPE tokenizer on the train split and encode the corpus.

    python -m moeflow.traces.tiny_moe.tokenizer WORK

Reads what `corpus.py` wrote. Writes the tokenizer files beside this script and `WORK/SPLIT_KIND.npy` (uint16, every
document between `<|bos|>` and `<|eos|>`).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 8192
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2
KINDS = ("prose", "dialogue", "docs", "code")
LONGEST_SHARE = 8_000_000  # characters per kind that the tokenizer is trained on


def texts(path: Path) -> Iterator[str]:
    """The documents of one corpus file."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)["text"]


def sample(work: Path) -> Iterator[str]:
    """Train documents, at most `LONGEST_SHARE` characters of each kind."""
    for kind in KINDS:
        total = 0
        for text in texts(work / f"train_{kind}.jsonl"):
            total += len(text)
            if total > LONGEST_SHARE:
                break
            yield text


def train(work: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries that puts `<|bos|>` before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample(work), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, path: Path) -> np.ndarray:
    """All documents of one corpus file as one array of token ids [N] uint16."""
    ids: list[int] = []
    for document in tokenizer(list(texts(path)))["input_ids"]:
        ids += [*document, tokenizer.eos_token_id]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    """Train, save, encode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that corpus.py wrote")
    work = parser.parse_args().work
    tokenizer = train(work)
    tokenizer.save_pretrained(HERE)
    for split in ("train", "heldout"):
        for kind in KINDS:
            ids = encode(tokenizer, work / f"{split}_{kind}.jsonl")
            np.save(work / f"{split}_{kind}.npy", ids)
            print(f"{split} {kind}: {len(ids):,} tokens")


if __name__ == "__main__":
    main()
