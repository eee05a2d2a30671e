"""A person as the reward: the two images of each antithetic pair are shown side by side, and the person chooses.

The image that is chosen scores 1 and the other 0; without a difference both score 0.5. `esengine train` shows the
pages. See `esengine.run.person`.
"""

from typing import Any

import torch

from esengine.base.errors import ConfigError, RewardError


class Human:
    """Stands for the person. It holds where the page is served, and cannot score images one by one.

    Args:
        host: address to serve the page on. With 0.0.0.0 a phone in the same network can open it.
        port: port of the page; 0: any free one.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    no_trial = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        if not isinstance(host, str) or not host:
            raise ConfigError(f"host: expected an address such as 127.0.0.1, got {host!r}")
        if type(port) is not int or not 0 <= port < 1 << 16:
            raise ConfigError(f"port: expected an integer from 0 to 65535, got {port!r}")
        self.host, self.port = host, port

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise RewardError("human: a person compares images in `esengine train` and `esengine judge` only")

    def settings(self) -> dict[str, Any]:
        """The same for every page, so that a run may go on at another port."""
        return {"judge": "a person"}
