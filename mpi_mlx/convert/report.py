"""What a conversion says about itself; the command line prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ConversionReport:
    """``errors`` maps a comparison ("text: mlx source / mlx result") to a relative logits error."""

    action: str
    destination: Path
    family: str
    tensors: int = 0
    nbytes: int = 0
    covered: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        return max(self.errors.values(), default=None)

    def lines(self) -> list[str]:
        out = [
            f"{self.action}: {self.family}, {self.tensors} tensors, {self.nbytes / 1e6:.1f} MB -> "
            f"{self.destination}"
        ]
        if self.covered:
            out.append(f"key coverage: {self.covered}")
        out += [f"logits error, {name}: {error:.1e}" for name, error in self.errors.items()]
        if self.errors:
            out.append(f"largest relative error of the logits: {self.worst:.1e}")
        return out + self.notes
