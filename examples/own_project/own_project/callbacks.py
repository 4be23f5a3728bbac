"""Callbacks: whatever is not fetch, backward or step."""

from dist_train.callbacks import Callback
from dist_train.trainer import Trainer


class FilterImages(Callback):
    """Logs an image of what each unit of the first layer looks for."""

    def __init__(self, every: str = "1 epoch") -> None:
        self.every = every

    def step_ends(self, run: Trainer) -> None:
        if not run.every(self.every):
            return
        weights = run.full_weights("model")  # on all ranks: whole, whatever the strategy
        filters = next(tensor for name, tensor in weights.items() if name.endswith("first.weight"))
        size = int(filters.shape[1] ** 0.5)
        images = filters.view(-1, 1, size, size)  # (width, S * S) -> (width, 1, S, S)
        largest = images.abs().amax(dim=(1, 2, 3), keepdim=True)
        run.images("filters", (images / largest + 1) / 2, caption="first layer, grey is zero")
