from dataclasses import dataclass
from pipeinfer.ports import Sampling, GREEDY
@dataclass
class ModelSampling:
    sampling: Sampling = GREEDY
    ignored: tuple[str, ...] = ()
def model_sampling(directory): return ModelSampling()
