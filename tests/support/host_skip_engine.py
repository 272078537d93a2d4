"""DeepSpeed's engine with the skipping done by the host: what it does not call cannot count."""

import torch
from evspan.pipeline.engine.adam import Update
from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine


class HostSkipEngine(DeepSpeedEngine):
    """Reads whether a micro-batch counts, and passes only those that count to DeepSpeed."""

    def backward(self, loss, counts):
        self.counted = bool(counts)
        if self.counted:
            super().backward(loss, counts)

    def step(self):
        if self.counted:
            return super().step()
        if self.updates_next and self.gate.any_counts is not None:
            zero = sum((p * 0).sum() for p in self.module.parameters())
            super().backward(zero, torch.tensor(True))
            return super().step()
        updates = self.updates_next
        self.engine.micro_steps += 1
        return Update(torch.tensor(0.0), torch.tensor(False)) if updates else None
