"""Which experts a checkpoint can work with."""

from __future__ import annotations

from dataclasses import dataclass

from fusionroute.errors import InvalidRequest, ModelRejected, Reason
from fusionroute.router_model import Manifest
from fusionroute.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits experts whose vocabulary is that of the checkpoint's manifest.

    Attributes:
        further_slots: of a checkpoint to come, or of a base model; they may be filled beside those of the manifest.
    """

    manifest: Manifest
    further_slots: tuple[str, ...] = ()

    def __call__(self, slot: str, model: common_pb2.ModelIdentity) -> None:
        """Returns if `model` may fill `slot`.

        Raises:
            InvalidRequest: UNKNOWN_SLOT.
            ModelRejected: VOCABULARY_MISMATCH, naming both values.
        """
        slots = (*self.manifest.slots, *self.further_slots)
        if slot not in slots:
            known = ", ".join(slots)
            raise InvalidRequest(
                Reason.UNKNOWN_SLOT,
                f"slot = {slot!r} is not in the checkpoint; known: {known}",
                metadata={"field": "slot", "limit": known},
            )
        self._check(
            slot, "tokenizer_fingerprint", model.tokenizer_fingerprint, self.manifest.tokenizer_fingerprint
        )
        self._check(slot, "logits_width", model.logits_width, self.manifest.logits_width)

    @staticmethod
    def _check(slot: str, field: str, got: object, wanted: object) -> None:
        if got != wanted:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"the expert for slot {slot!r} has {field} {got}, the router checkpoint needs {wanted}",
                metadata={"field": field, "limit": str(wanted)},
            )
