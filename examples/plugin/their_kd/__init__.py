"""A distiller of one's own: logits as they are (Ba and Caruana 2014)."""

from sakd.distillers import Distiller, kept_mean


class LogitRegression(Distiller):
    """Mean squared difference of the logits."""

    def spot_loss(self, spot, student, teacher, keep, indices):
        return kept_mean((student - teacher).square().mean(1), keep)
