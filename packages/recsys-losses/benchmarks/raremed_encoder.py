"""Visits per second of RAREMed's fine-tuning step: padded batches beside one visit at a time, on the same visits.

    python raremed_encoder.py                    # width 64, two layers: the network of the benchmark cases
    python raremed_encoder.py --network full     # width 512, three layers, feed-forward 2048: the published one

The port works as the authors' code does: Python lists, one forward per visit without padding, the representations put
together afterwards. It is timed in the authors' regime (a step per visit) and, to separate the encoder from the number
of optimiser steps, with one step per batch. All sides start from the same weights and learn from the same visits.
Prints one JSON object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ballast_testing.measure import emit, interleaved, machine, parser, ratio
from recsys_losses.raremed import EHRDataset, RAREMed, medication_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from recsys_losses.raremed import Visit

NETWORKS = {
    "small": {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "ff_dim": 256},
    "full": {"embed_dim": 512, "num_layers": 3, "num_heads": 4, "ff_dim": 2048},
}


def encode_alone(model: RAREMed, visit: Visit) -> Tensor:
    """Represent one visit (1, h): look up code by code, put the pieces together, run the encoder on all positions."""
    second = 3 + model.num_diagnoses
    diagnoses = [model.token(torch.tensor([[2 + code]])) for code in visit.diagnoses]
    procedures = [model.token(torch.tensor([[second + code]])) for code in visit.procedures]
    cls, sep = model.token(torch.tensor([[0]])), model.token(torch.tensor([[1]]))
    embedded = torch.cat([cls, *diagnoses, sep, *procedures], dim=1)
    first = torch.arange(len(diagnoses) + 1)
    rank = torch.cat([first, 1000 + torch.arange(len(procedures) + 1)])
    segment = torch.tensor([0] * (len(diagnoses) + 2) + [1] * len(procedures))
    embedded = embedded + model.segment(segment) + model.relevance(rank)
    return model.encoder(embedded)[:, 0]


def port_loss(model: RAREMed, visits: list[Visit], target: Tensor, adjacency: Tensor) -> Tensor:
    """The authors' three terms, visit by visit; torch's margin loss and a product of matrices per visit."""
    total = torch.zeros(())
    for visit, y in zip(visits, target, strict=True):
        logits = model.medication(encode_alone(model, visit))
        s = torch.sigmoid(logits)
        positive = torch.full((1, y.numel()), -1)
        positive[0, : len(visit.medications)] = torch.tensor(visit.medications)
        bce = nn.functional.binary_cross_entropy_with_logits(logits, y.unsqueeze(0))
        margin = nn.functional.multilabel_margin_loss(s, positive)
        ddi = 5e-4 * ((s.T @ s) * adjacency).sum()
        total = total + 0.995 * bce + 0.005 * margin + 0.1 * ddi
    return total / len(visits)


def our_loss(model: RAREMed, visits: list[Visit], target: Tensor, adjacency: Tensor) -> Tensor:
    """The same through the padded batch."""
    logits = model([visit.diagnoses for visit in visits], [visit.procedures for visit in visits])
    return medication_loss(logits, target, adjacency, reduction="mean", validate=False).loss


def steps_of(
    model: RAREMed, data: EHRDataset, rows: list[int], batch_size: int, loss: Callable[..., Tensor]
) -> Callable[[], None]:
    """Return one pass over the visits, in steps of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    target, adjacency = data.targets(), torch.as_tensor(data.ddi_adj, dtype=torch.float32)

    def run() -> None:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            optimizer.zero_grad(set_to_none=True)
            loss(model, [data.visits[i] for i in batch], target[batch], adjacency).backward()
            optimizer.step()

    return run


def encoding_of(model: RAREMed, data: EHRDataset, rows: list[int], *, alone: bool) -> Callable[[], None]:
    """Return one pass over the visits that only represents them, without gradients."""
    visits = [data.visits[i] for i in rows]

    def run() -> None:
        with torch.no_grad():
            if alone:
                torch.cat([encode_alone(model, visit) for visit in visits])
            else:
                model.encode([visit.diagnoses for visit in visits], [visit.procedures for visit in visits])

    return run


def network(name: str, data: EHRDataset, seed: int) -> RAREMed:
    """Return a fresh network in training mode, without dropout so that both sides compute the same."""
    sizes = (data.num_diagnoses, data.num_procedures, data.num_medications)
    return RAREMed(*sizes, **NETWORKS[name], dropout=0.0, seed=seed)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--network", choices=sorted(NETWORKS), default="small")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--batches", type=int, default=2, help="batches per measured run (default: 2)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    data = EHRDataset.synthetic(seed=args.seed)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
    rows = order[: args.batch_size * args.batches].tolist()
    fresh = {name: network(args.network, data, args.seed) for name in ("ours", "port", "port_batch_1", "encoding")}

    batch = rows[: args.batch_size]
    visits, target = [data.visits[i] for i in batch], data.targets()[batch]
    adjacency = torch.as_tensor(data.ddi_adj, dtype=torch.float32)
    losses = [loss(fresh["encoding"], visits, target, adjacency).item() for loss in (our_loss, port_loss)]

    seconds = interleaved(
        {
            "ours": steps_of(fresh["ours"], data, rows, args.batch_size, our_loss),
            "port_one_step_per_batch": steps_of(fresh["port"], data, rows, args.batch_size, port_loss),
            "port_one_step_per_visit": steps_of(fresh["port_batch_1"], data, rows, 1, port_loss),
            "ours_encoding": encoding_of(fresh["encoding"], data, rows, alone=False),
            "port_encoding": encoding_of(fresh["encoding"], data, rows, alone=True),
        },
        repetitions=args.repetitions,
        warmup=args.warmup,
    )
    median = {name: value["median_s"] for name, value in seconds.items()}
    emit(
        {
            **machine(),
            "case": f"{args.network} network, batch {args.batch_size}",
            "network": NETWORKS[args.network],
            "difference_of_losses": abs(losses[0] - losses[1]),
            "visits_per_s_ours": len(rows) / median["ours"],
            "visits_per_s_port": len(rows) / median["port_one_step_per_visit"],
            "speed_of_training_ours_over_port_one_step_per_visit": ratio(
                median["port_one_step_per_visit"], median["ours"]
            ),
            "speed_of_training_ours_over_port_one_step_per_batch": ratio(
                median["port_one_step_per_batch"], median["ours"]
            ),
            "speed_of_encoding_ours_over_port": ratio(median["port_encoding"], median["ours_encoding"]),
            "runs": seconds,
        },
        args.output,
    )


if __name__ == "__main__":
    main()
