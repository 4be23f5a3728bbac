"""What trained translators write: BLEU of the test split by size of the beam, and where attention looks.

    python benchmarks/translation.py [RUN ...]     (runs of seq2seq-ddtp, attention-ddtp and transformer-ddtp)

By default the runs that benchmarks/results.py left in runs/results. The map is that of the first run with attention,
over the test split's first sentence of 6 to 9 tokens that it translates without a mistake; it goes into docs/images.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from dist_train import bleu, trained
from dist_train.data import data_folders, evaluation_batches
from dist_train.data_shards import tokens
from dist_train.models.decoding import Decoding
from dist_train.models.seq2seq import Seq2Seq
from dist_train.pictures import plots
from dist_train.trainer import Trainer

ROOT = Path(__file__).parents[1]
RUNS = [
    ROOT / "runs" / "results" / f"{name}-ddtp" for name in ("seq2seq", "attention", "transformer")
]
BEAMS = (1, 2, 5, 10)
TOKENS = 32
SHORT, LONG = 6, 9


def by_beam(trainer: Trainer) -> list[str]:
    """BLEU of the test split for each size of the beam, and the seconds that it took."""
    objective: Any = trainer.objective
    objective.decode = TOKENS
    cells = []
    for beam in BEAMS:
        began, total = time.perf_counter(), torch.zeros(bleu.COUNTS, dtype=torch.float64)
        objective.how = Decoding(beam=beam)
        for micro in evaluation_batches(trainer.recipe, trainer.world, "test"):
            total += objective.evaluate(trainer.view(), micro)["bleu"].sum(0)
        score = bleu.score(total.tolist())
        cells.append(f"{score:.2f} ({time.perf_counter() - began:.0f} s)")
    return cells


def attention_map(trainer: Trainer, model: Seq2Seq, file: Path) -> None:
    """Draw how much each written token looks at each token that was read."""
    objective: Any = trainer.objective
    tokenizer = tokens.load(data_folders(trainer.recipe)[0])
    end = tokenizer.boundary
    for micro in evaluation_batches(trainer.recipe, trainer.world, "test"):
        source, length = micro["source"], micro["source_length"] + 1
        written = objective.translate(trainer.view(), source, length, TOKENS, Decoding())
        for row in range(micro.real):
            size, count = int(length[row]), int(micro["target_length"][row])
            truth = micro["target"][row, 1 : count + 1]
            fits = SHORT <= size - 1 <= LONG and count <= TOKENS
            if not fits or not torch.equal(written[row, :count], truth):
                continue
            read = source[row : row + 1, :size]
            with torch.no_grad():
                given = torch.cat([micro["target"][row : row + 1, :1], truth[None, :-1]], dim=1)
                weights = model.eval().attention_weights(read, length[row : row + 1], given)[0]
            columns = [_shown(tokenizer, i, end) for i in read[0].tolist()]
            rows = [_shown(tokenizer, i, end) for i in truth.tolist()]
            plots.labelled_map(file, weights.tolist(), rows, columns, "written", "read")
            print(
                f"{file.name}: {tokenizer.decode(read[0].tolist()).decode()} -> "
                f"{tokenizer.decode(truth.tolist()).decode()}"
            )
            return
    raise SystemExit("no sentence of the test split is translated without a mistake: no map")


def _shown(tokenizer: tokens.Tokenizer, token: int, end: int) -> str:
    return "<eos>" if token == end else tokenizer.decode([token]).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, default=RUNS)
    parser.add_argument("--map-only", action="store_true", help="no BLEU")
    options = parser.parse_args()
    print(f"| run | {' | '.join(f'beam {beam}' for beam in BEAMS)} |\n|{'---|' * (1 + len(BEAMS))}")
    drawn = False
    for run in options.runs:
        trainer = trained.restore(run)
        if not options.map_only:
            print(f"| `{trainer.recipe.name}` | {' | '.join(by_beam(trainer))} |", flush=True)
        model = trainer.engines["model"].player.networks["model"]
        if not drawn and isinstance(model, Seq2Seq) and model.feed:
            attention_map(trainer, model, ROOT / "docs" / "images" / "course-attention.png")
            drawn = True


if __name__ == "__main__":
    main()
