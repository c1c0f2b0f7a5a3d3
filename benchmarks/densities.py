"""Which share of 128 x 128 blocks each mask keeps: by flexmask's own maps, beside what the FlashMask paper's benchmark states.

python -m benchmarks.densities            prints the table of docs/benchmarks.md ("Masks of the benchmark")
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import masks as zoo
from benchmarks.markdown import table

LENGTHS = (8192, 32768, 131072)
PUBLISHED = {  # means over the five samples of documents, at LENGTHS
    "sliding_window": (0.0757, 0.0643, 0.0615),
    "causal_document": (0.1375, 0.0522, 0.0455),
    "document": (0.2595, 0.1006, 0.0901),
    "global_sliding": (0.1646, 0.1320, 0.1238),
    "causal_blockwise": (0.3268, 0.1270, 0.1255),
    "prefix_lm_document": (0.1438, 0.0544, 0.0476),
    "qk_sparse": (0.4800, 0.4845, 0.4837),
}


def densities(name: str, length: int) -> list[float]:
    """The share of kept blocks for each sample of documents; of one sample where the mask has none."""
    count = 1 if name in zoo.DOCUMENT_FREE else len(zoo.samples(length))
    made = (zoo.build(name, length, "cpu", sample) for sample in range(count))
    return [mask.block_mask(length, length).statistics()["density"] for mask in made]


def rows(names: Iterable[str] = zoo.NAMES, lengths: Iterable[int] = LENGTHS) -> list[list[str]]:
    """The lines of the table: mask, length, sample 0, mean, published."""
    lines = []
    for name in names:
        for length in lengths:
            found = densities(name, length)
            published = PUBLISHED[name][LENGTHS.index(length)] if name in PUBLISHED else None
            several = len(found) > 1
            cells = [f"{found[0]:.4f}", f"{sum(found) / len(found):.4f}" if several else "", f"{published:.4f}" if published else ""]
            lines.append([name.replace("_", " "), str(length), *cells])
    return lines


def main() -> None:
    print(table(["mask", "length", "sample 0", "mean of five", "published"], rows()))


if __name__ == "__main__":
    main()
