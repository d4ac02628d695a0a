"""Choose the prompts of the bundled recording from held-out documents.

    python -m moeflow.traces.tiny_moe.prompts WORK

Writes `prompts.jsonl` beside this script: `COUNT` prompts of 20 to 40 tokens, the kinds of text in turn, spread over
all held-out documents, each beginning at a paragraph or line.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
KINDS = ("prose", "dialogue", "docs", "code")
COUNT = 240  # a multiple of the number of kinds
SHORTEST, LONGEST = 20, 40  # tokens
NEXT = 60  # tokens that must still follow in the document

Document = dict[str, str]


def excerpt(tokenizer: PreTrainedTokenizerBase, document: Document, random: np.random.Generator) -> str | None:
    """A passage from a random line of the document, or None where that line will not do."""
    text = document["text"]
    starts = [match.end() for match in re.finditer(r"(?:^|\n\s*\n|\n(?=[\w\"(]))", text)]
    passage = text[starts[random.integers(len(starts))] :].lstrip()[:2000]
    ids = tokenizer(passage, add_special_tokens=False)["input_ids"]
    length = int(random.integers(SHORTEST, LONGEST + 1))
    if len(ids) < length + NEXT:
        return None
    prompt = tokenizer.decode(ids[:length])
    letters = sum(character.isalpha() for character in prompt)
    return prompt.rstrip() if letters > 0.5 * len(prompt) else None


def choose(tokenizer: PreTrainedTokenizerBase, documents: list[Document], count: int, seed: int) -> list[Document]:
    """`count` different prompts, the documents taken in turn."""
    random = np.random.default_rng(seed)
    chosen: dict[str, Document] = {}
    while len(chosen) < count:
        for index in random.permutation(len(documents)):
            prompt = excerpt(tokenizer, documents[index], random)
            if prompt and len(chosen) < count:
                chosen.setdefault(prompt, documents[index])
    return [
        {"prompt": prompt, "source": f"{document['source']}: {document['name']}"} for prompt, document in chosen.items()
    ]


def main() -> None:
    """Write the prompts, the kinds in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the folder that corpus.py wrote")
    work = parser.parse_args().work
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    by_kind = []
    for seed, kind in enumerate(KINDS):
        documents = [json.loads(line) for line in (work / f"heldout_{kind}.jsonl").open()]
        by_kind.append(choose(tokenizer, documents, COUNT // len(KINDS), seed))
    rows = [
        {"id": turn * len(KINDS) + place, "prompt": row["prompt"], "domain": KINDS[place], "source": row["source"]}
        for turn, chosen in enumerate(zip(*by_kind, strict=True))
        for place, row in enumerate(chosen)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
