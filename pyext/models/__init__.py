"""Networks of the papers."""

from pyext.models.hcgnet import HCGNet, hcgnet_a1, hcgnet_a2, hcgnet_a3, hcgnet_b, hcgnet_c

__all__ = ["HCGNet", "hcgnet_a1", "hcgnet_a2", "hcgnet_a3", "hcgnet_b", "hcgnet_c"]
