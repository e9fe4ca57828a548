"""Labels of frozen experts: aligned with the tokens they judge."""

from __future__ import annotations

import torch

from trainer.labels import ExpertLabels, Targets, label

WIDTH = 5
IDS = torch.tensor([[3, 1, 4, 2, 0, 0], [2, 2, 1, 3, 4, 1]])
SUPERVISED = torch.tensor(
    [[False, False, True, True, False, False], [False, False, False, False, True, True]]
)


def successor_expert(step: int, confidence: float):
    """An expert that expects the token after x to be x + step."""

    def compute(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((ids + step) % WIDTH, WIDTH) * confidence

    return compute


def labelled(**options: bool) -> tuple[Targets, ExpertLabels]:
    targets = Targets.of(IDS, SUPERVISED)
    experts = [successor_expert(3, 4.0), successor_expert(1, 2.0)]
    return targets, label(experts, IDS, targets, **options)


def test_targets_are_the_supervised_tokens_row_by_row() -> None:
    targets, _ = labelled()
    assert targets.gold.tolist() == [4, 2, 4, 1]
    assert targets.flat_index[targets.mask].tolist() == [0, 1, 2, 3]
    assert targets.mask.tolist() == SUPERVISED[:, 1:].tolist()


def test_labels_judge_each_token_from_the_position_before_it() -> None:
    _, labels = labelled()
    before = [1, 4, 3, 4]
    assert labels.argmax_ids[:, 0].tolist() == [(token + 3) % WIDTH for token in before]
    assert labels.argmax_ids[:, 1].tolist() == [(token + 1) % WIDTH for token in before]


def test_gold_logprobs_are_those_of_the_experts_distribution() -> None:
    _, labels = labelled()
    right = torch.log_softmax(torch.tensor([4.0, 0, 0, 0, 0]), dim=0)
    expected = [right[0], right[0 if (4 + 3) % WIDTH == 2 else 1], right[1], right[1]]
    torch.testing.assert_close(labels.gold_logprobs[:, 0], torch.stack(expected))


def test_whole_rows_are_kept_only_on_request() -> None:
    _, without = labelled()
    targets, labels = labelled(keep_rows=True)
    assert without.rows is None
    assert labels.rows is not None
    assert labels.rows.shape == (2, len(targets.gold), WIDTH)
    assert torch.equal(labels.rows[1].argmax(dim=1), labels.argmax_ids[:, 1])
