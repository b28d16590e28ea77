"""Online distillation between peers (MCL-OKD, arXiv 2006.04093).

`peers` builds them from any backbone; `pyext train mcl-okd` trains them and exports one.
"""

from pyext.distill.batch_contrast import BatchContrast
from pyext.distill.distillation import Distillation
from pyext.distill.peers import PeerOutputs, Peers, peers

__all__ = ["BatchContrast", "Distillation", "PeerOutputs", "Peers", "peers"]
