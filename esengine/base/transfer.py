"""Copies tensors from the host to a device without waiting for it."""

import torch


def upload(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor on `device`, in `dtype` if given. A copy to a GPU uses pinned memory, so the host does not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)
