"""DRNet (arXiv 1911.08691): dissect a network into class-wise channels and run any sub-network from one set of weights.

atlas = pyext.subnet.dissect(model, loader, num_classes)
subnet = pyext.subnet.reconstruct(model, atlas, classes=[3, 5], keep=0.11)
small = subnet.materialize()
"""

from pyext.subnet.atlas import Atlas, AtlasError, fingerprint
from pyext.subnet.dissection import dissect
from pyext.subnet.graph import Plan, UnsupportedNetwork, plan
from pyext.subnet.materialize import recalibrate
from pyext.subnet.subnet import Subnet, Summary, reconstruct

__all__ = [
    "Atlas",
    "AtlasError",
    "Plan",
    "Subnet",
    "Summary",
    "UnsupportedNetwork",
    "dissect",
    "fingerprint",
    "plan",
    "recalibrate",
    "reconstruct",
]
