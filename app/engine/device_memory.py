"""How much memory the device has, and what of it is taken."""

import torch


def device_memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes by kind; empty for a processor, whose memory the process's own figures tell.

    `allocated` lies in tensors, `reserved` is what torch holds for them and for later ones, `free`
    is what nobody holds, in this process or another, and `total` is all there is.
    """
    if device.type != "cuda":
        return {}
    try:
        free, total = torch.cuda.mem_get_info(device)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "free": free,
            "total": total,
        }
    except RuntimeError:  # a lost device tells nothing; that it is lost is told elsewhere
        return {}
