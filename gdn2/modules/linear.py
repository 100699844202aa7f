"""Linear maps that differ from torch's in the law their weights are drawn from."""

import torch
from torch import nn

XAVIER_GAIN = 2**-2.5  # the official GDN-2 training code


class XavierLinear(nn.Linear):
    """Every map of a delta mixer: Xavier uniform with a small gain, zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=XAVIER_GAIN)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class OutputLinear(nn.Linear):
    """A map back to the residual stream: torch's law, which a deep model scales down."""

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        super().reset_parameters()
        self.weight.mul_(scale)
