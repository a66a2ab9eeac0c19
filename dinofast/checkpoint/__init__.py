"""Checkpoints in the official layout: written atomically, read without running anything that is
inside."""

from .initial import initialize as initialize
from .reading import _SAFE as _SAFE
from .reading import arguments_in as arguments_in
from .reading import read as read
from .saving import Saver as Saver
from .saving import TrainState as TrainState
from .saving import save as save
from .saving import try_saving as try_saving
from .storage import SaveFailed as SaveFailed
from .storage import link as link
from .storage import lock_output_dir as lock_output_dir
from .weights import arguments as arguments
from .weights import check_fit as check_fit
from .weights import finite as finite
from .weights import is_linear as is_linear
from .weights import load_backbone as load_backbone
from .weights import mapping_of as mapping_of
from .weights import numbered as numbered
from .weights import weights_under as weights_under
