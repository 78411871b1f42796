import numpy as np
import numpy.typing as npt

def random_masking(draw_ids: npt.NDArray[np.int64], seed: int, num_patches: int) -> npt.NDArray[np.int32]: ...
