"""Names for points in a text: a 64-bit rolling hash of everything since a request's admission.

Both replicas compute it independently, so a drafted record needs no shared node numbers. A collision can only offer a
wrong draft token, which the target rejects.
"""

__all__ = ["mix", "seed"]

_MASK = 0xFFFF_FFFF_FFFF_FFFF


def seed(handle: int) -> int:
    """Hash of the text at admission; ``handle`` is the 64-bit number of the admission."""
    return mix(0x9E37_79B9_7F4A_7C15, handle)


def mix(prefix_hash: int, token: int) -> int:
    """Hash of a prefix extended by ``token``: one round of a multiply-xorshift mixer."""
    h = ((prefix_hash ^ (token + 0x632B_E59B_D9B4_E019)) * 0xD6E8_FEB8_6659_FD93) & _MASK
    return h ^ (h >> 32)
